"""Guesses of a smaller model. It keeps the keys and values of what it has read, in a page pool of its own.

It reads a sequence once that decodes, a batch of tokens in an iteration, so that nobody waits for a long prompt. What
it has read stays while the sequence waits, preempted, and goes when the sequence ends or others need the room: then it
is read again, or not guessed on. Guesses go by the model alone, whatever adapter, grammar, penalties or words are asked
for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.draft import Ask
from farspan.engine.faster import speed_up
from farspan.engine.path import capture_decode, open_path
from farspan.engine.request import SamplingParams
from farspan.engine.runner import Piece
from farspan.engine.sampler import SampleRow, choose_tokens
from farspan.errors import EngineError, ModelError
from farspan.kv.ownership import Forgotten, Owned, told

_NO_END: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Reading:
    """What the draft model has computed of one sequence."""

    pages: list[int] = field(default_factory=list)
    num_read: int = 0
    """Tokens whose keys and values are in the pages."""
    guessed: list[int] = field(default_factory=list)
    """The last of those, which were guesses when they were read."""

    def agree(self, tokens: Sequence[int]) -> None:
        """Keep what is still true now that these are the tokens; the last of them is read in any case."""
        start = self.num_read - len(self.guessed)
        pairs = zip(self.guessed, tokens[start:], strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(self.guessed))
        self.num_read, self.guessed = min(start + same, len(tokens) - 1), []


@dataclass(slots=True)
class _Guess:
    """One sequence while it is guessed on."""

    ask: Ask
    most: int
    reading: _Reading
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)

    @property
    def num_unread(self) -> int:
        return len(self.ask.tokens) + len(self.tokens) - self.reading.num_read

    def unread(self, count: int) -> Piece:
        """The next so many of them."""
        known, start, end = len(self.ask.tokens), self.reading.num_read, self.reading.num_read + count
        tokens = [*self.ask.tokens[start:end], *self.tokens[max(0, start - known) : max(0, end - known)]]
        return Piece(tokens, start, self.reading.pages)

    def has_read(self, count: int) -> None:
        """The next so many are in the pages."""
        self.reading.num_read += count
        self.reading.guessed = self.tokens[: max(0, self.reading.num_read - len(self.ask.tokens))]


class ModelDrafter:
    """A model of the same vocabulary guesses with the random numbers that will choose: where it agrees, it is right."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig, vocab_size: int) -> None:
        """Takes the model over (its attention is switched). `config.kv_bytes` is for its own pages alone.

        Raises ModelError when it has fewer than the `vocab_size` tokens of the model it guesses for, or cannot be run
        exactly.
        """
        own = int(model.get_input_embeddings().num_embeddings)
        if own < vocab_size:
            raise ModelError(
                f"the draft model has {own} tokens, the model it guesses for {vocab_size}; use one of both"
            )
        path = open_path(model, config)
        if path.states is not None:
            # What was read of a wrong guess stays in a state.
            raise ModelError(
                f"the draft model ({model.config.model_type}) keeps a state that cannot be set back; use a transformer"
            )
        speed_up(model)
        self.pool, self._runner, self._num_tokens = path.pool, path.runner, own
        self._chunk = config.max_batch_tokens
        known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
        self._max_context_tokens = min(known, config.max_context_tokens or known)
        # Last of what changes the model: a graph remembers its kernels.
        capture_decode(path, min(config.graph_rows, config.max_sequences), self._max_context_tokens)
        # Those that were asked for last are the last.
        self._readings: OrderedDict[str, _Reading] = OrderedDict()

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """A guess for each. Where pages are scarce, the first ones have them."""
        guesses = [self._begin(ask) for ask in asks]
        asked = {ask.request_id for ask in asks}
        live = self._catch_up([g for place, g in enumerate(guesses) if self._reserve(g, asked, guesses[place + 1 :])])
        while live:
            logits_NV = self._run(live, [1] * len(live))
            rows = [SampleRow(g.params, len(g.ask.tokens) + len(g.tokens), 0) for g in live]
            for guess, choice in zip(live, choose_tokens(logits_NV, rows, _NO_END), strict=True):
                if choice.problem is None:
                    guess.tokens.append(choice.token)
            # A guess that did not grow found no numbers: it is over.
            live = [g for g in live if g.num_unread and len(g.tokens) < g.most]
        return [guess.tokens for guess in guesses]

    def forget(self, request_id: str) -> None:
        if reading := self._readings.pop(request_id, None):
            self._drop(reading)

    def forgotten(self, alive: Container[str]) -> list[Forgotten]:
        """Pages that are held for no request that is `alive`.

        Raises EngineError when a page is lost or doubly owned.
        """
        self.pool.check_integrity()
        here = ((name, reading) for name, reading in self._readings.items() if name in alive)
        return self.pool.forgotten(Owned(_owner(name), reading.pages) for name, reading in here)

    def check_integrity(self) -> None:
        """Raises EngineError when a page is lost, doubly owned, or held for nobody."""
        if forgotten := self.forgotten(self._readings):
            raise EngineError(told(forgotten))

    @property
    def num_held(self) -> int:
        return self.pool.num_held

    def _begin(self, ask: Ask) -> _Guess:
        reading = self._readings.setdefault(ask.request_id, _Reading())
        self._readings.move_to_end(ask.request_id)
        reading.agree(ask.tokens)
        # The last token that is guessed is not read.
        most = min(ask.most, self._max_context_tokens - len(ask.tokens))
        return _Guess(ask, most, reading, self._plain(ask.params))

    def _plain(self, params: SamplingParams) -> SamplingParams:
        """What a draft follows: how tokens are drawn, not what depends on the answer so far."""
        bias = tuple((token, add) for token, add in params.logit_bias if token < self._num_tokens)
        return replace(params, logprobs=None, min_tokens=0, grammar=None, logit_bias=bias)

    def _reserve(self, guess: _Guess, asked: Container[str], later: Sequence[_Guess]) -> bool:
        """Pages for the whole guess, or no guess. `later`: those that come after it."""
        reading, layout = guess.reading, self.pool.layout
        # A client may name tokens that only the larger model has a row for.
        if guess.most < 1 or max(guess.ask.tokens[reading.num_read :]) >= self._num_tokens:
            self._drop(reading)
            return False
        missing = layout.num_pages(len(guess.ask.tokens) + guess.most - 1) - len(reading.pages)
        if missing <= 0:
            return True
        idle = [one for name, one in self._readings.items() if name not in asked]
        if reading.pages:
            found = self._make_room(missing, [*idle, *(one.reading for one in reversed(later))])
        else:
            # With room to grow for the others: their next pages would be taken from it again.
            num_others = sum(bool(one.pages) for one in self._readings.values()) - sum(bool(one.pages) for one in idle)
            found = self._make_room(missing + num_others * layout.num_groups, idle)
        pages = self.pool.alloc(missing, _owner(guess.ask.request_id)) if found else None
        reading.pages += pages or []
        return pages is not None

    def _make_room(self, num_pages: int, others: Sequence[_Reading]) -> bool:
        """Free so many pages, at the cost of the first of `others` if need be; false, and nobody loses any: too few."""
        if self.pool.num_free + sum(len(one.pages) for one in others) < num_pages:
            return False
        for one in others:
            if self.pool.num_free >= num_pages:
                break
            self._drop(one)
        return True

    def _drop(self, reading: _Reading) -> None:
        self.pool.free(reading.pages)
        reading.pages, reading.num_read, reading.guessed = [], 0, []

    def _catch_up(self, guesses: Sequence[_Guess]) -> list[_Guess]:
        """Read what is unread but the last token, a batch at a time; those of which nothing else is left."""
        left = self._chunk
        todo: list[_Guess] = []
        counts: list[int] = []
        for guess in guesses:
            if count := min(guess.num_unread - 1, left):
                todo.append(guess)
                counts.append(count)
                left -= count
        if todo:
            self._run(todo, counts)
        return [guess for guess in guesses if guess.num_unread == 1]

    def _run(self, guesses: Sequence[_Guess], counts: Sequence[int]) -> Tensor:
        """Read so many tokens of each; logits [N, V] after the last of them."""
        logits_NV = self._runner.run([guess.unread(count) for guess, count in zip(guesses, counts, strict=True)])
        # Only now: of a forward that raised nothing is known.
        for guess, count in zip(guesses, counts, strict=True):
            guess.has_read(count)
        return logits_NV


def _owner(request_id: str) -> str:
    return f"the guesses for request {request_id}"
