"""Guess the next tokens of a sequence, cheaply; the model checks the guesses.

A guess is never more than a guess: a wrong one costs time and changes no token.
Source: speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192); guessing from the text itself
(prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from farspan.engine.request import SamplingParams, SequenceState

# How far back a sequence is looked through: text that repeats itself does so within a few thousand tokens.
WINDOW_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Ask:
    """At most `most` tokens that may follow `tokens`."""

    request_id: str
    tokens: Sequence[int]
    most: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class DraftUse:
    """What came of guesses."""

    proposed: int = 0
    """Guessed tokens that were checked."""
    accepted: int = 0
    """Of those, the ones that were chosen: each saves its sequence an iteration."""

    def after(self, draft: Sequence[int], chosen: Sequence[int]) -> DraftUse:
        """With those of one sequence in one iteration, which chose no token after its first wrong guess."""
        right = sum(guess == token for guess, token in zip(draft, chosen, strict=False))
        return DraftUse(self.proposed + len(draft), self.accepted + right)

    def since(self, before: DraftUse) -> DraftUse:
        """What came after `before`."""
        return DraftUse(self.proposed - before.proposed, self.accepted - before.accepted)

    def __add__(self, other: DraftUse) -> DraftUse:
        return DraftUse(self.proposed + other.proposed, self.accepted + other.accepted)


NO_GUESSES = DraftUse()


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

    Of all places among the last `window` tokens where the end of a sequence stood before, the one counts that agrees
    with it the longest, and of those the latest. Each token is indexed once and forgotten once, so that the index of a
    sequence has at most `window` entries for each number of tokens that may agree, however long it gets.
    """

    def __init__(self, shortest: int = 2, longest: int = 8, window: int = WINDOW_TOKENS) -> None:
        """`shortest`, `longest`: how many tokens must, and may, agree."""
        assert 1 <= shortest <= longest
        assert window >= 1
        self._sizes, self._window = range(longest, shortest - 1, -1), window
        self._places: dict[str, _Places] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._guess(ask) for ask in asks]

    def forget(self, request_id: str) -> None:
        self._places.pop(request_id, None)

    @property
    def num_entries(self) -> int:
        """Of the indices of all sequences."""
        return sum(places.num_entries for places in self._places.values())

    def _guess(self, ask: Ask) -> list[int]:
        places = self._places.setdefault(ask.request_id, _Places(self._sizes, self._window))
        places.index(ask.tokens)
        for size in self._sizes:
            if place := places.find(ask.tokens, size):
                return list(ask.tokens[place : place + ask.most])
        return []


class _Places:
    """Where each run of tokens of one sequence was last followed by something, not too long ago."""

    def __init__(self, sizes: range, window: int) -> None:
        self._sizes, self._window = sizes, window
        self._after: dict[tuple[int, ...], int] = {}
        # The places from the first to the next one are indexed.
        self._first = self._next = 1

    @property
    def num_entries(self) -> int:
        return len(self._after)

    def index(self, tokens: Sequence[int]) -> None:
        first = max(self._first, len(tokens) - self._window)
        for place in range(self._first, min(first, self._next)):
            for run in self._runs(tokens, place):
                # Where it came again, the later place counts.
                if self._after.get(run) == place:
                    del self._after[run]
        # The end itself is left out: nothing follows it yet.
        for place in range(max(first, self._next), len(tokens)):
            for run in self._runs(tokens, place):
                self._after[run] = place
        self._first, self._next = first, max(self._next, len(tokens))

    def find(self, tokens: Sequence[int], size: int) -> int | None:
        return self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None

    def _runs(self, tokens: Sequence[int], place: int) -> Iterator[tuple[int, ...]]:
        """The tokens before a place, as many as may agree."""
        return (tuple(tokens[place - size : place]) for size in self._sizes if size <= place)


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
    history = sequence.history
    return list(guess[: inside if history is None else history.fits(guess[:inside])])


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
