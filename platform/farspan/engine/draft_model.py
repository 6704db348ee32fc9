"""Guesses of a smaller model. It keeps the keys and values of what it has read, in a page pool of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.draft import Ask
from farspan.engine.path import open_path
from farspan.engine.request import SamplingParams
from farspan.engine.runner import Piece
from farspan.engine.sampler import SampleRow, choose_tokens
from farspan.errors import EngineError, ModelError
from farspan.kv.ownership import Owned, told

_NO_END: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Reading:
    """What the draft model has computed of one sequence."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Guess:
    """One sequence while it is guessed on."""

    ask: Ask
    reading: _Reading
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)

    @property
    def unread(self) -> list[int]:
        return [*self.ask.tokens, *self.tokens][len(self.reading.tokens) :]


class ModelDrafter:
    """A model of the same vocabulary guesses with the random numbers that will choose: where it agrees, it is right."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig, vocab_size: int) -> None:
        """Takes the model over (its attention is switched).

        Raises ModelError when its vocabulary is not that of the model it guesses for, or it cannot be run exactly.
        """
        own = int(model.get_input_embeddings().num_embeddings)
        if own != vocab_size:
            raise ModelError(
                f"the draft model has {own} tokens, the model it guesses for {vocab_size}; use one of both"
            )
        path = open_path(model, config)
        if path.states is not None:
            # What was read of a wrong guess stays in a state.
            raise ModelError(
                f"the draft model ({model.config.model_type}) keeps a state that cannot be set back; use a transformer"
            )
        self._pool, self._runner = path.pool, path.runner
        self._chunk = config.max_batch_tokens
        text = model.config.get_text_config(decoder=True)
        self._max_context_tokens = getattr(text, "max_position_embeddings", None) or 2**31
        self._readings: dict[str, _Reading] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        guesses = [_Guess(ask, self._reading(ask), _plain(ask.params)) for ask in asks]
        live = [guess for guess in guesses if self._reserve(guess)]
        while live:
            logits_NV = self._read(live)
            rows = [SampleRow(g.params, len(g.ask.tokens) + len(g.tokens), 0) for g in live]
            for guess, choice in zip(live, choose_tokens(logits_NV, rows, _NO_END), strict=True):
                if choice.problem is None:
                    guess.tokens.append(choice.token)
            # A guess that did not grow found no numbers: it is over.
            live = [g for g in live if g.unread and len(g.tokens) < g.ask.most]
        return [guess.tokens for guess in guesses]

    def forget(self, request_id: str) -> None:
        if reading := self._readings.pop(request_id, None):
            self._pool.free(reading.pages)

    def check_integrity(self) -> None:
        """Raises EngineError when a page is lost, doubly owned, or held for nobody."""
        self._pool.check_integrity()
        owned = (Owned(_owner(name), reading.pages) for name, reading in self._readings.items())
        if forgotten := self._pool.forgotten(owned):
            raise EngineError(told(forgotten))

    @property
    def num_held(self) -> int:
        return self._pool.num_held

    def _reading(self, ask: Ask) -> _Reading:
        """What is computed of the sequence and still true; at least its last token is read again."""
        reading = self._readings.setdefault(ask.request_id, _Reading())
        pairs = zip(reading.tokens, ask.tokens[:-1], strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(ask.tokens) - 1)
        del reading.tokens[same:]
        return reading

    def _reserve(self, guess: _Guess) -> bool:
        """Pages for the whole guess, or no guess."""
        ask, reading = guess.ask, guess.reading
        longest = len(ask.tokens) + ask.most - 1
        if ask.most < 1 or longest >= self._max_context_tokens:
            return False
        missing = self._pool.layout.num_pages(longest) - len(reading.pages)
        pages = self._pool.alloc(max(0, missing), _owner(ask.request_id))
        if pages is None:
            self.forget(ask.request_id)
            return False
        reading.pages += pages
        return True

    def _read(self, guesses: Sequence[_Guess]) -> Tensor:
        """Compute what is unread of each; logits [N, V] after the last token."""
        while most := max(len(guess.unread) for guess in guesses) - 1:
            # Long prompts first, in chunks, until one token of each is left: those are read together.
            todo = [guess for guess in guesses if len(guess.unread) > 1]
            size = max(1, min(most, self._chunk // len(todo)))
            self._run(todo, [min(size, len(guess.unread) - 1) for guess in todo])
        return self._run(guesses, [1] * len(guesses))

    def _run(self, guesses: Sequence[_Guess], counts: Sequence[int]) -> Tensor:
        pieces = []
        for guess, count in zip(guesses, counts, strict=True):
            tokens = guess.unread[:count]
            pieces.append(Piece(tokens, len(guess.reading.tokens), guess.reading.pages))
            guess.reading.tokens += tokens
        return self._runner.run(pieces)


def _plain(params: SamplingParams) -> SamplingParams:
    """What a draft follows: how tokens are drawn, not what depends on the answer so far."""
    return replace(params, logprobs=None, min_tokens=0, grammar=None)


def _owner(request_id: str) -> str:
    return f"the guesses for request {request_id}"
