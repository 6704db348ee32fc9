"""The inference loop of one process: requests in, tokens out, one iteration per `step`.

One thread owns an engine. Pages are the only thing that leaves it: `take` after a prefill, `adopt` before a decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.adapters import Adapters
from farspan.engine.admission import Admission
from farspan.engine.advance import Advanced, Computed, Ends, advance, take_rows, wants_prompt_logprobs
from farspan.engine.beyond import host_traffic, page_offload, prefix_cache
from farspan.engine.burden import Burden, burden_of
from farspan.engine.cut import Share
from farspan.engine.draft import NO_GUESSES, Drafter
from farspan.engine.draft_folder import open_drafter
from farspan.engine.fairness import Claim, Service, fair_order
from farspan.engine.faster import speed_up
from farspan.engine.generate import generate
from farspan.engine.guesses import Guesses
from farspan.engine.history import Recall
from farspan.engine.holdings import Holdings, owner_of
from farspan.engine.lead import Leader
from farspan.engine.path import capture_decode, open_path
from farspan.engine.request import Completion, Event, FailedEvent, SamplingParams, SequenceState
from farspan.engine.runner import Piece, Runner
from farspan.engine.sampler import UNSOUND
from farspan.engine.scheduler import Chunk, Limits, Row, schedule
from farspan.engine.steady import Steady
from farspan.engine.steer import eos_token_ids_of
from farspan.engine.tables import fill_table, held_pages, lasting_pages
from farspan.engine.terms import PLAIN_TERMS, Terms
from farspan.errors import EngineError, RequestError
from farspan.kv.host_cache import BlockCache
from farspan.kv.layout import KvLayout
from farspan.kv.ownership import Forgotten, Owned, told
from farspan.kv.prefix import OPEN_SCOPE, PrefixCache, PrefixScope

# An iteration with nothing to compute waits so long for pages from host memory, then lets its caller look around.
_HOST_WAIT_S = 0.005


class Engine:
    """Continuous batching over one model and one page pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
        host_cache: Callable[[KvLayout], BlockCache] | None = None,
        share: Share | None = None,
        ahead: bool | None = None,
    ) -> None:
        """Takes the model over (its attention is switched). Deadlines are times of `clock`.

        With `share`, of the leader, the model is its part of one that other ranks compute with it (`engine/lead.py`).

        `tokenizer`, a fast one of transformers, is needed for stop strings and grammars only. `drafter` guesses tokens
        where engine.draft_tokens is not 0; none: engine.draft_model, or who looks for them in the sequence's own text.
        `host_cache` opens what keeps pages beyond the pool where engine.host_cache_bytes is not 0; none: memory of this
        process. `ahead`: whether a decode step in one launch is launched before the one before it was looked at; none:
        on CUDA.

        Raises ModelError when the model cannot be run exactly, EngineError when no page fits into kv_bytes,
        ConfigError when pages that are moved out would not be all that a sequence of this model needs, TierError when
        the host has less memory than engine.host_cache_bytes, and what `open_drafter` and `Adapters.add` raise.
        """
        if config.draft_model is not None and drafter is None and share is None:
            drafter, config = open_drafter(model, config, tokenizer)
        path = open_path(model, config, share)
        speed_up(model)
        self.leader = None if share is None else Leader(path.runner, path.pool, share.gang)
        """Where other ranks compute with this one."""
        self.path, self.pool, self.states, self._runner = path.name, path.pool, path.states, self.leader or path.runner
        self.adapters = Adapters(model, path, config)
        self.pages_are_all = path.pages_are_all
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
        self.max_context_tokens = min(known, config.max_context_tokens or known)
        if share is None:
            # Last of what changes the model: a graph remembers its kernels.
            capture_decode(path, min(config.graph_rows, config.max_sequences), self.max_context_tokens)
        self.eos_token_ids = eos_token_ids_of(model)
        self._ends = Ends(self.eos_token_ids, self.max_context_tokens)
        self._guesses = Guesses.of(path, config, drafter, self.vocab_size, self.max_context_tokens)
        self.drafted = NO_GUESSES
        """What came of all guesses since the engine began."""
        self._limits = Limits(
            config.max_batch_tokens,
            config.max_sequences if path.states is None else path.states.num_slots,
            path.pool.layout.page_tokens,
            config.prefill_tokens,
            config.decode_tokens,
            path.pool.layout.num_groups,
        )
        self._clock = clock
        self._step = 0
        self._service = Service()
        self._running: list[SequenceState] = []
        self._waiting: list[SequenceState] = []
        self._taken: dict[str, SequenceState] = {}
        self._num_arrived = 0
        self._stalled = False
        self._prefix, offload = prefix_cache(path, config), page_offload(path, config)
        self.host = host_traffic(path, config, self._prefix, host_cache, clock)
        self._holdings = Holdings(
            self.pool, self._prefix, offload, clock, path.states, config.max_batch_tokens, self.host
        )
        self._admission = Admission(
            self.adapters,
            Recall(self.vocab_size, self.eos_token_ids, model.device, tokenizer),
            self._holdings,
            self.pool.num_pages,
            self.vocab_size,
            self.max_context_tokens,
            self.pages_are_all,
        )
        self._steady: Steady | None = None
        if share is None and isinstance(path.runner, Runner):
            on_cuda = self.pool.device.type == "cuda"
            self._steady = Steady(
                path.runner,
                self.pool,
                self._holdings,
                self._service,
                self._ends,
                partial(self._settle, sound=True),
                clock,
                ahead=on_cuda if ahead is None else ahead,
            )

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._holdings.num_fetching)

    @property
    def room_tokens(self) -> int:
        """The longest prompt and answer that the pages are enough for."""
        return self.pool.layout.room_tokens(self.pool.num_pages, self._limits.max_batch_tokens, self.max_context_tokens)

    @property
    def stalled(self) -> bool:
        """The last step could do nothing: pages that are held outside must come back first."""
        return self._stalled

    @property
    def lost(self) -> str:
        """Why this engine will never compute anything again; empty: it will."""
        return "" if self.leader is None else self.leader.lost

    @property
    def burden(self) -> Burden:
        """What all requests that are here still need."""
        return burden_of((*self._running, *self._waiting))

    @property
    def quotas(self) -> tuple[int | None, int | None]:
        """(most prompt tokens, most decoding sequences) of an iteration."""
        return self._limits.prefill_tokens, self._limits.decode_tokens

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of an iteration."""
        return self._limits.max_batch_tokens

    @property
    def max_sequences(self) -> int:
        """Most sequences side by side."""
        return self._limits.max_sequences

    @property
    def prefixes(self) -> PrefixCache | None:
        """Where beginnings of requests are found again."""
        return self._prefix

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        answered: Sequence[int] = (),
        prefill_only: bool = False,
        terms: Terms = PLAIN_TERMS,
    ) -> None:
        """Queue a request. `answered` are tokens an earlier engine already gave: this one goes on after them.

        Raises RequestError when it can never be answered here.
        """
        if prefill_only:
            self._admission.check_travel(request_id)
        self._holdings.seek(self._enqueue(request_id, prompt, params, answered, prefill_only, terms))

    def adopt(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        answered: Sequence[int],
        pages: list[int],
        *,
        terms: Terms = PLAIN_TERMS,
    ) -> None:
        """Queue a request whose prompt is already computed in `pages`, which the engine holds from now on.

        The last of them hold its recurrent state, where the model has one.

        Raises RequestError, with `pages` still the caller's.
        """
        self._admission.check_travel(request_id)
        assert answered, "a prefill gives the first token"
        assert len(pages) == self.pool.layout.num_travelling(len(prompt)), "pages of exactly the prompt"
        sequence = self._enqueue(request_id, prompt, params, answered, False, terms)
        num_pages = len(pages) - self.pool.layout.num_state_pages
        sequence.state_pages, sequence.num_computed = pages[num_pages:], len(prompt)
        fill_table(self.pool.layout, sequence, pages[:num_pages])
        self.pool.hand(pages, owner_of(sequence))
        self._holdings.remember(sequence, tail=True)

    def take(self, request_id: str) -> tuple[list[int], int]:
        """(pages, tokens in them) of a finished `prefill_only` request; the caller holds the pages from now on.

        Only what is needed to go on is in them.
        """
        sequence = self._taken.pop(request_id)
        return [*held_pages(sequence), *sequence.state_pages], sequence.num_computed

    def growing(self) -> Iterator[tuple[str, int, list[int]]]:
        """(request, life, pages) of each `prefill_only` request that is being computed.

        The pages are the first of those that `take` will give, full and never changed. A request that lost its pages
        on the way begins another life with others.
        """
        for sequence in self._running:
            if sequence.prefill_only:
                yield sequence.request_id, sequence.preemptions, lasting_pages(self.pool.layout, sequence)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its pages; false when it is not here (any more)."""
        for group in (self._running, self._waiting):
            for sequence in group:
                if sequence.request_id == request_id:
                    group.remove(sequence)
                    self._holdings.release(sequence)
                    self._guesses.drafter.forget(request_id)
                    if self._steady is not None and not self._running:
                        # Nobody would ask for what it was one step ahead of.
                        self._steady.land(self._running, self._step)
                    return True
        if sequence_taken := self._taken.pop(request_id, None):
            self._holdings.release(sequence_taken)
        return sequence_taken is not None

    def set_quotas(self, prefill_tokens: int | None, decode_tokens: int | None) -> None:
        """Most prompt tokens and most decoding sequences of every later iteration: the role of this engine."""
        self._limits = replace(self._limits, prefill_tokens=prefill_tokens, decode_tokens=decode_tokens)

    def add_adapter(self, name: str, folder: str) -> None:
        """Let requests name an adapter from now on. Raises what `Adapters.add` raises."""
        self.adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises EngineError while requests use it, or when it is not here."""
        sequences = (*self._running, *self._waiting)
        self.adapters.remove(name, [s.request_id for s in sequences if s.terms.adapter == name])

    def pin_prefix(self, name: str, tokens: Sequence[int], scope: PrefixScope = OPEN_SCOPE) -> int:
        """Keep what is computed of a beginning until `unpin_prefix`; gives the number of tokens kept.

        Raises RequestError when a request that is here would not fit any more.
        """
        sequences = (*self._running, *self._waiting)
        longest = max(
            (self._admission.most_pages(s.num_prompt, len(s.tokens), s.params, s.prefill_only) for s in sequences),
            default=1,
        )
        return self._holdings.pin(name, tokens, scope, self.pool.num_pages - longest)

    def unpin_prefix(self, name: str) -> None:
        """Let go of what is kept under a name; unknown names are no error."""
        self._holdings.unpin(name)

    def step(self) -> list[Event]:
        """One iteration: a new token for each request that got its turn, several where guesses were right."""
        events = self._expire()
        self._step += 1
        self._holdings.forget_matches()
        if self._steady is not None and not self._guesses.most:
            found = self._steady.iterate(self._running, self._waiting, self._limits, self._step, events)
            if found is not None:
                self._stalled = False
                return found
        held_back = self._holdings.held_back(self._running, self._in_line())
        rows = {s.request_id: s for s in (*self._running, *self._waiting)}
        decision = schedule(
            [self._holdings.row(s, self._step) for s in self._running],
            self._ahead(held_back),
            self.pool.num_free,
            self._limits,
            parked=[self._holdings.row(s, self._step) for s in self._waiting if s.pages],
            costs=self._holdings.costs(),
        )
        fetching = bool(held_back or self._holdings.num_fetching)
        self._stalled = not decision.chunks and not decision.preempted and self.has_work and not fetching
        for preemption in decision.preempted:
            self._preempt(rows[preemption.request_id], offload=preemption.offload)
        if not decision.chunks:
            if fetching:
                self._holdings.wait_for_host(_HOST_WAIT_S)
            return events
        sequences = [rows[chunk.request_id] for chunk in decision.chunks]
        pieces = self._pieces(decision.chunks, sequences)
        started = self._clock()
        events += self._after(sequences, pieces, self.adapters.run(self._runner, pieces))
        self._holdings.learn_pace(self._clock() - started, [len(piece.tokens) for piece in pieces])
        return events

    def _expire(self) -> list[Event]:
        """Fail every request whose deadline has passed."""
        now = self._clock()
        late = [
            s for s in (*self._running, *self._waiting) if s.terms.deadline_s is not None and s.terms.deadline_s <= now
        ]
        events: list[Event] = []
        for sequence in late:
            self.cancel(sequence.request_id)
            reason = f"its deadline passed after {sequence.num_answered} of at most {sequence.params.max_tokens} tokens"
            events.append(FailedEvent(sequence.request_id, RequestError(sequence.request_id, reason)))
        return events

    def _ahead(self, held_back: set[str]) -> Iterator[Row]:
        """Who waits, in the order of admission; what they would find computed is looked up one by one."""
        for sequence in self._in_line():
            if sequence.request_id not in held_back:
                yield self._holdings.waiting_row(sequence, self._step)

    def _in_line(self) -> Iterator[SequenceState]:
        """Who waits, in the order of admission."""
        waiting = {s.request_id: s for s in self._waiting}
        claims = (
            Claim(s.request_id, s.terms.priority, s.terms.tenant, len(s.tokens) - s.num_computed, s.due_s)
            for s in self._waiting
        )
        for request_id in fair_order(claims, self._service.given):
            yield waiting[request_id]

    def _pieces(self, chunks: Sequence[Chunk], sequences: Sequence[SequenceState]) -> list[Piece]:
        """Give everybody the pages that were decided, guess with those left over, and cut out what is computed."""
        self._holdings.claim(sequences)
        for chunk, sequence in zip(chunks, sequences, strict=True):
            self._holdings.extend(sequence, chunk.num_pages)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
                self._running.append(sequence)
                sequence.began_s = sequence.began_s or self._clock()
            decoding = len(sequence.tokens) - sequence.num_computed == 1
            self._service.charge(sequence.terms.tenant, chunk.num_tokens, decode=decoding)
            sequence.last_step = self._step
        self._running.sort(key=lambda s: s.rank)
        tokens_left = self._limits.max_batch_tokens - sum(chunk.num_tokens for chunk in chunks)
        for sequence in self._guesses.draft(sequences, tokens_left, self.pool.num_free):
            needed = self.pool.layout.num_pages(len(sequence.tokens) + len(sequence.draft))
            self._holdings.extend(sequence, max(len(sequence.pages), needed))
        pieces: list[Piece] = []
        for chunk, sequence in zip(chunks, sequences, strict=True):
            end = sequence.num_computed + chunk.num_tokens
            tokens = [*sequence.tokens[sequence.num_computed : end], *sequence.draft]
            num_logits = len(tokens) if wants_prompt_logprobs(sequence) else 1 + len(sequence.draft)
            state = self._holdings.state(sequence)
            past, adapter = sequence.num_computed, sequence.terms.adapter
            pieces.append(Piece(tokens, past, sequence.pages, state, num_logits=num_logits, adapter=adapter))
        return pieces

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Answer all prompts, batched; for offline use. `params.n` answers for each prompt, one after the other.

        Raises RequestError when one cannot be answered.
        """
        return generate(self, prompts, params)

    def close(self) -> None:
        """Let the other ranks end, where there are any."""
        if self.leader is not None:
            self.leader.close()

    def check_integrity(self, elsewhere: Iterable[Owned] = ()) -> None:
        """Raises EngineError when a page or a state is lost or doubly owned, or a page is held for nobody.

        `elsewhere`: what is held outside, as after `take` and before `adopt`.
        """
        if forgotten := self.forgotten(elsewhere):
            raise EngineError(told(forgotten))

    def forgotten(self, elsewhere: Iterable[Owned], *, untaken: bool = True) -> list[Forgotten]:
        """Pages that an owner never gave back; without `untaken`, what `take` was not asked for yet is among them.

        Raises EngineError when a page or a state is lost or doubly owned.
        """
        self.pool.check_integrity()
        if self.states is not None:
            self.states.check_integrity([s.request_id for s in self._running])
        here = (*self._running, *self._waiting)
        alive = (*here, *(self._taken.values() if untaken else ()))
        ahead = () if self._steady is None else self._steady.owned()
        found = self.pool.forgotten((*self._holdings.owned(alive), *ahead, *elsewhere))
        return found + self._guesses.forgotten({sequence.request_id for sequence in here})

    def _enqueue(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        answered: Sequence[int],
        prefill_only: bool,
        terms: Terms,
    ) -> SequenceState:
        if any(s.request_id == request_id for s in (*self._running, *self._waiting)) or request_id in self._taken:
            raise RequestError(request_id, "a request of this id is already being answered")
        sequence = self._admission.admit(
            request_id, prompt, params, answered, prefill_only, terms, arrival=self._num_arrived, step=self._step
        )
        self._service.arrive(sequence.terms.tenant, {s.terms.tenant for s in (*self._running, *self._waiting)})
        self._num_arrived, sequence.arrived_s = self._num_arrived + 1, self._clock()
        self._waiting.append(sequence)
        return sequence

    def _preempt(self, sequence: SequenceState, *, offload: bool) -> None:
        self._holdings.preempt(sequence, offload=offload)
        if sequence in self._running:
            self._running.remove(sequence)
            self._waiting.append(sequence)
            self._waiting.sort(key=lambda s: s.arrival)

    def _after(self, sequences: Sequence[SequenceState], pieces: Sequence[Piece], logits_RV: Tensor) -> list[Event]:
        """Choose tokens for the sequences whose every token is computed; the others go on with their prompts."""
        ready: list[Computed] = []
        events: list[Event] = []
        for computed in take_rows(sequences, pieces, logits_RV):
            sequence = computed.sequence
            if computed.rows:
                ready.append(computed)
            elif computed.sound:
                # Only now: nobody may find keys and values that made logits unsound.
                self._holdings.remember(sequence, tail=sequence.num_computed == sequence.num_prompt)
                self._holdings.trim(sequence)
            else:
                events += self._fail(sequence, UNSOUND)
        results = advance([c.sequence for c in ready], [c.rows.start for c in ready], logits_RV, self._ends)
        for result, computed in zip(results, ready, strict=True):
            events += self._settle(result, sound=computed.sound)
        return events

    def _settle(self, result: Advanced, *, sound: bool) -> list[Event]:
        """Give pages back or keep them, as the sequence is over or goes on. `sound`: the logits of every guess are."""
        sequence, events = result.sequence, list[Event](result.events)
        draft, sequence.draft = sequence.draft, []
        if draft:
            self.drafted = self.drafted.after(draft, [event.token for event in result.events])
        if result.problem is not None and not draft:
            return [*events, *self._fail(sequence, result.problem)]
        # The last token chosen is not computed; what wrong guesses left behind is overwritten by the next tokens.
        sequence.num_computed = len(sequence.tokens) - 1
        if result.finished or sequence.prefill_only:
            self._running.remove(sequence)
            self._guesses.drafter.forget(sequence.request_id)
            if sound:
                self._holdings.remember(sequence, tail=True)
            if sequence.prefill_only:
                self._holdings.trim(sequence)
                self._holdings.pack(sequence)
                self._taken[sequence.request_id] = sequence
            else:
                self._holdings.release(sequence)
        elif result.problem is not None or not sound:
            # A guess may be a token whose weights are NaN: what it touched is computed again, without guesses.
            sequence.may_draft = False
            self._preempt(sequence, offload=False)
        else:
            self._holdings.remember(sequence, tail=sequence.num_computed == sequence.num_prompt)
            self._holdings.shrink(sequence, self.pool.layout.num_pages(len(sequence.tokens)))
            self._holdings.trim(sequence)
        return events

    def _fail(self, sequence: SequenceState, reason: str) -> list[Event]:
        self.cancel(sequence.request_id)
        return [FailedEvent(sequence.request_id, RequestError(sequence.request_id, reason))]
