"""Guess the next tokens of a sequence, cheaply; the model checks the guesses.

A guess is never more than a guess: a wrong one costs time and changes no token.
Source: speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192); guessing from the text itself
(prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from farspan.engine.request import SamplingParams, SequenceState


@dataclass(frozen=True, slots=True)
class Ask:
    """At most `most` tokens that may follow `tokens`."""

    request_id: str
    tokens: Sequence[int]
    most: int
    params: SamplingParams


class Drafter(Protocol):
    """Makes guesses for all sequences of an iteration at once."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """A guess for each, possibly empty."""
        ...

    def forget(self, request_id: str) -> None:
        """A request is over, or was never asked for."""
        ...


class SuffixDrafter:
    """Guesses that what followed the last words before follows them again.

    Of all places where the end of a sequence stood before, the one counts that agrees with it the longest, and of
    those the latest. Each token is indexed once.
    """

    def __init__(self, shortest: int = 2, longest: int = 8) -> None:
        """`shortest`, `longest`: how many tokens must, and may, agree."""
        assert 1 <= shortest <= longest
        self._sizes = range(longest, shortest - 1, -1)
        self._places: dict[str, _Places] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._guess(ask) for ask in asks]

    def forget(self, request_id: str) -> None:
        self._places.pop(request_id, None)

    def _guess(self, ask: Ask) -> list[int]:
        places = self._places.setdefault(ask.request_id, _Places())
        places.index(ask.tokens, self._sizes)
        for size in self._sizes:
            if place := places.find(ask.tokens, size):
                return list(ask.tokens[place : place + ask.most])
        return []


class _Places:
    """Where each run of tokens of one sequence was last followed by something."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def index(self, tokens: Sequence[int], sizes: range) -> None:
        # The end itself is left out: nothing follows it yet.
        for place in range(self._num_indexed + 1, len(tokens)):
            for size in sizes:
                if size <= place:
                    self._after[tuple(tokens[place - size : place])] = place
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def find(self, tokens: Sequence[int], size: int) -> int | None:
        return self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None


def draft_limit(sequence: SequenceState, max_context_tokens: int) -> int:
    """Most tokens worth guessing: the last token of an answer is chosen, never computed."""
    pending = len(sequence.tokens) - sequence.num_computed
    if pending != 1 or sequence.prefill_only or not sequence.may_draft:
        return 0
    longest = min(sequence.num_prompt + sequence.params.max_tokens, max_context_tokens)
    return longest - len(sequence.tokens) - 1


def allowed_draft(sequence: SequenceState, guess: Sequence[int], vocab_size: int) -> list[int]:
    """The beginning of a guess that can be right."""
    inside = next((i for i, token in enumerate(guess) if not 0 <= token < vocab_size), len(guess))
    matcher = sequence.history.matcher if sequence.history is not None else None
    return list(guess[: inside if matcher is None else matcher.fits(guess[:inside])])


@dataclass(frozen=True, slots=True)
class DraftRoom:
    """What an iteration has left for guesses once everything else has its share."""

    batch_tokens: int
    free_pages: int
    page_tokens: int


def split_room(room: DraftRoom, lengths: Sequence[int], pages: Sequence[int], wishes: Sequence[int]) -> list[int]:
    """How many tokens each sequence may guess, in their order.

    A sequence holds `pages` pages and will have computed `lengths` tokens without guesses.
    """
    tokens_left, pages_left = room.batch_tokens, room.free_pages
    granted: list[int] = []
    for length, held, wish in zip(lengths, pages, wishes, strict=True):
        most = max(0, min(wish, tokens_left, (held + pages_left) * room.page_tokens - length))
        pages_left -= max(0, -(-(length + most) // room.page_tokens) - held)
        tokens_left -= most
        granted.append(most)
    return granted
