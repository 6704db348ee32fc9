"""The inference loop of one process: requests in, tokens out, one iteration per `step`.

One thread owns an engine. Pages are the only thing that leaves it: `take` after a prefill, `adopt` before a decode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.path import open_path
from farspan.engine.request import (
    Completion,
    Event,
    FailedEvent,
    SamplingParams,
    SequenceState,
    TokenEvent,
    check_prompt,
)
from farspan.engine.runner import Piece
from farspan.engine.sampler import choose_token
from farspan.engine.scheduler import Limits, Row, schedule
from farspan.errors import EngineError, RequestError


class Engine:
    """Continuous batching over one model and one page pool."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        """Takes the model over (its attention is switched).

        Raises ModelError when the model cannot be run exactly, EngineError when no page fits into kv_bytes.
        """
        path = open_path(model, config)
        text = model.config.get_text_config(decoder=True)
        self.path, self.pool, self.states, self._runner = path.name, path.pool, path.states, path.runner
        self.pages_are_all = path.pages_are_all
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        known = getattr(text, "max_position_embeddings", None) or 2**31
        self.max_context_tokens = min(known, config.max_context_tokens or known)
        self.eos_token_ids = _eos_token_ids(model)
        most = config.max_sequences if self.states is None else self.states.num_slots
        self._limits = Limits(config.max_batch_tokens, most, self.pool.layout.page_tokens)
        self._running: list[SequenceState] = []
        self._waiting: list[SequenceState] = []
        self._taken: dict[str, SequenceState] = {}
        self._num_arrived = 0
        self._stalled = False

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def stalled(self) -> bool:
        """The last step could do nothing: pages that are held outside must come back first."""
        return self._stalled

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        answered: Sequence[int] = (),
        prefill_only: bool = False,
    ) -> None:
        """Queue a request. `answered` are tokens an earlier engine already gave: this one goes on after them.

        Raises RequestError when it can never be answered here.
        """
        if prefill_only:
            self._refuse_travel(request_id)
        self._enqueue(request_id, prompt, params, answered, prefill_only)

    def adopt(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, answered: Sequence[int], pages: list[int]
    ) -> None:
        """Queue a request whose prompt is already computed in `pages`, which the engine holds from now on.

        Raises RequestError, with `pages` still the caller's.
        """
        self._refuse_travel(request_id)
        assert answered, "a prefill gives the first token"
        assert len(pages) == self.pool.layout.num_pages(len(prompt)), "pages of exactly the prompt"
        sequence = self._enqueue(request_id, prompt, params, answered, False)
        sequence.pages, sequence.num_computed = pages, len(prompt)

    def take(self, request_id: str) -> tuple[list[int], int]:
        """(pages, tokens in them) of a finished `prefill_only` request; the caller holds the pages from now on."""
        sequence = self._taken.pop(request_id)
        return sequence.pages, sequence.num_computed

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its pages; false when it is not here (any more)."""
        for group in (self._running, self._waiting):
            for sequence in group:
                if sequence.request_id == request_id:
                    group.remove(sequence)
                    self._release(sequence)
                    return True
        if sequence_taken := self._taken.pop(request_id, None):
            self._release(sequence_taken)
        return sequence_taken is not None

    def step(self) -> list[Event]:
        """One iteration: at most one new token for each request."""
        rows = {s.request_id: s for s in (*self._running, *self._waiting)}
        decision = schedule(_rows(self._running), _rows(self._waiting), self.pool.num_free, self._limits)
        self._stalled = not decision.chunks and not decision.preempted
        for request_id in decision.preempted:
            self._preempt(rows[request_id])
        if not decision.chunks:
            return []
        pieces: list[Piece] = []
        sequences: list[SequenceState] = []
        for chunk in decision.chunks:
            sequence = rows[chunk.request_id]
            new_pages = self.pool.alloc(chunk.num_pages - len(sequence.pages))
            assert new_pages is not None, "the scheduler gave away pages that are not there"
            sequence.pages += new_pages
            if sequence in self._waiting:
                self._waiting.remove(sequence)
                self._running.append(sequence)
            end = sequence.num_computed + chunk.num_tokens
            state = self.states.hold(sequence.request_id) if self.states else None
            todo = sequence.tokens[sequence.num_computed : end]
            pieces.append(Piece(todo, sequence.num_computed, sequence.pages, state))
            sequences.append(sequence)
        self._running.sort(key=lambda s: s.arrival)
        logits_NV = self._runner.run(pieces)
        events: list[Event] = []
        for sequence, piece, logits_V in zip(sequences, pieces, logits_NV, strict=True):
            sequence.num_computed += len(piece.tokens)
            events += self._after(sequence, logits_V)
        return events

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Answer all prompts, batched; for offline use. Raises RequestError when one cannot be answered."""
        answers: dict[str, list[int]] = {}
        finished: dict[str, str] = {}
        try:
            for index, prompt in enumerate(prompts):
                self.add(f"prompt-{index}", prompt, params)
                answers[f"prompt-{index}"] = []
            while len(finished) < len(prompts):
                events = self.step()
                if self.stalled:
                    raise EngineError("the KV pages are held elsewhere; nothing can be computed")
                for event in events:
                    if isinstance(event, FailedEvent):
                        raise event.error
                    answers[event.request_id].append(event.token)
                    if event.finish:
                        finished[event.request_id] = event.finish
        finally:
            for request_id in answers:
                self.cancel(request_id)
        return [Completion(tuple(answers[f"prompt-{i}"]), finished[f"prompt-{i}"]) for i in range(len(prompts))]

    def check_integrity(self) -> None:
        """Raises EngineError when a page or a state is lost or doubly owned."""
        self.pool.check_integrity()
        if self.states is not None:
            self.states.check_integrity([s.request_id for s in self._running])

    def _enqueue(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        answered: Sequence[int],
        prefill_only: bool,
    ) -> SequenceState:
        tokens = [*prompt, *answered]
        check_prompt(request_id, tokens, len(prompt), params, self.vocab_size)
        if any(s.request_id == request_id for s in (*self._running, *self._waiting)) or request_id in self._taken:
            raise RequestError(request_id, "a request of this id is already being answered")
        if len(prompt) + 1 > self.max_context_tokens:
            most = self.max_context_tokens - 1
            raise RequestError(request_id, f"the prompt has {len(prompt)} tokens, the model takes at most {most}")
        # The longest this can become: the last token chosen is never computed.
        longest = min(len(prompt) + params.max_tokens, self.max_context_tokens) - 1
        if self.pool.layout.num_pages(longest) > self.pool.num_pages:
            room = self.pool.num_pages * self.pool.layout.page_tokens
            raise RequestError(
                request_id, f"prompt and answer need {longest} tokens of KV, engine.kv_bytes holds {room}"
            )
        sequence = SequenceState(request_id, tokens, len(prompt), params, self._num_arrived, prefill_only)
        self._num_arrived += 1
        self._waiting.append(sequence)
        return sequence

    def _refuse_travel(self, request_id: str) -> None:
        if not self.pages_are_all:
            raise RequestError(
                request_id,
                "this model keeps a state beside its pages, which does not travel to another worker yet; "
                "compute prompt and answer in one (transfer.colocate_below_tokens)",
            )

    def _release(self, sequence: SequenceState) -> None:
        """Give back everything a sequence holds."""
        self.pool.free(sequence.pages)
        if self.states is not None:
            self.states.release(sequence.request_id)

    def _preempt(self, sequence: SequenceState) -> None:
        self._release(sequence)
        sequence.pages, sequence.num_computed = [], 0
        sequence.preemptions += 1
        if sequence in self._running:
            self._running.remove(sequence)
            self._waiting.append(sequence)
            self._waiting.sort(key=lambda s: s.arrival)

    def _after(self, sequence: SequenceState, logits_V: Tensor) -> list[Event]:
        if sequence.num_computed < len(sequence.tokens):
            return []
        if not bool(torch.isfinite(logits_V.max())):
            self.cancel(sequence.request_id)
            reason = "the model computed NaN or infinite logits for this prompt"
            return [FailedEvent(sequence.request_id, RequestError(sequence.request_id, reason))]
        token = choose_token(logits_V, sequence.params, len(sequence.tokens))
        sequence.tokens.append(token)
        finish = self._finish(sequence, token)
        if finish or sequence.prefill_only:
            self._running.remove(sequence)
            if sequence.prefill_only:
                self._taken[sequence.request_id] = sequence
            else:
                self._release(sequence)
        return [TokenEvent(sequence.request_id, token, finish)]

    def _finish(self, sequence: SequenceState, token: int) -> str | None:
        params = sequence.params
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        full = len(sequence.tokens) >= self.max_context_tokens
        return "length" if full or sequence.num_answered >= params.max_tokens else None


def _rows(sequences: Sequence[SequenceState]) -> list[Row]:
    return [Row(s.request_id, len(s.tokens), s.num_computed, len(s.pages)) for s in sequences]


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """What transformers' generate stops at: the generation config, else the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
