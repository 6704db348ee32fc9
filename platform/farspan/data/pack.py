"""The pack plan: which tokens of which documents make up training sequence number `index`. Pure.

For each epoch the documents are shuffled by (seed, epoch), laid end to end, and the stream of all epochs is cut every
`sequence_tokens` tokens. A document that crosses a cut goes on as a new piece in the next sequence: no token is
dropped, repeated or padded. The plan depends on nothing else, not on the number of workers and not on what was asked
before, so any process can ask for any sequence at any time.

Documents may have weights, in hundredths. Epochs then come in rounds: the fewest epochs in which every document can be
laid a whole number of times, exactly as often as its weight asks (a hundred for 0.01, one for whole weights). Within a
round each document's turns are spread evenly, from a beginning drawn by the seed.
See docs/decisions/0003-pack-plan.md and 0020-corpora.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farspan.errors import ConfigError

_EPOCHS_KEPT = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start..stop of one document."""

    document: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class PackPlan:
    """Sequences 0, 1, 2, ... for ever; O(log documents) each once its epoch's order is known."""

    def __init__(
        self,
        document_lengths: Sequence[int] | np.ndarray,
        sequence_tokens: int,
        seed: int,
        weights_hundredths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """`document_lengths` in tokens, each at least 1; `seed` any integer from 0 below 2^64; weights 100 if none."""
        if sequence_tokens < 1:
            raise ConfigError("data.sequence_tokens", "must be at least 1", sequence_tokens, "use 8192")
        if not 0 <= seed < 2**64:
            raise ConfigError("seed", "must lie in 0..2^64 - 1", seed, "use seed=0")
        self.sequence_tokens = sequence_tokens
        self.seed = seed
        self._lengths = np.asarray(document_lengths, dtype=np.int64)
        if self._lengths.size == 0 or int(self._lengths.min()) < 1:
            raise ConfigError("data.corpus", "must hold documents of at least 1 token", 0, "build it again")
        weights = np.full(self._lengths.size, 100) if weights_hundredths is None else np.asarray(weights_hundredths)
        if weights.shape != self._lengths.shape or int(weights.min()) < 1:
            raise ConfigError("data.corpus", "must weigh each document by 0.01 or more", 0, "build it again")
        step = math.gcd(100, int(np.gcd.reduce(weights)))
        self.epochs_per_round = 100 // step
        # Turns of each document in a round.
        self._turns = weights.astype(np.int64) // step
        self._phases = self._draw_phases()
        self._epoch_ends = self._measure_epochs()
        self.round_tokens = int(self._epoch_ends[-1])
        """Tokens after which every document was laid exactly as often as its weight asks."""
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sequence(self, index: int) -> tuple[Piece, ...]:
        """The pieces of sequence `index`, in order; their lengths add up to `sequence_tokens`."""
        if index < 0:
            raise IndexError(f"sequences are counted from 0, got {index}")
        start = index * self.sequence_tokens
        stop = start + self.sequence_tokens
        pieces: list[Piece] = []
        while start < stop:
            epoch, offset, rest = self._locate(start)
            wanted = min(stop - start, rest)
            pieces += self._cut(epoch, offset, offset + wanted)
            start += wanted
        return tuple(pieces)

    def order(self, epoch: int) -> np.ndarray:
        """The documents of one epoch in the order in which they are laid."""
        return self._order(epoch)[0]

    def _draw_phases(self) -> np.ndarray:
        """Where in the round each document's turns begin, 0..epochs_per_round - 1."""
        if self.epochs_per_round == 1:
            return np.zeros(self._lengths.size, np.int64)
        # Not the key of any epoch.
        key = np.array([self.seed, 2**64 - 1], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(self._lengths.size)
        return (draws % np.uint64(self.epochs_per_round)).astype(np.int64)

    def _counts(self, epoch: int) -> np.ndarray:
        """How often each document is laid in an epoch: the whole parts of an evenly rising line."""
        before = self._turns * (epoch % self.epochs_per_round) + self._phases
        return (before + self._turns) // self.epochs_per_round - before // self.epochs_per_round

    def _measure_epochs(self) -> np.ndarray:
        """Tokens from the beginning of a round to the end of each of its epochs."""
        return np.cumsum([int((self._counts(epoch) * self._lengths).sum()) for epoch in range(self.epochs_per_round)])

    def _locate(self, token: int) -> tuple[int, int, int]:
        """(epoch, token in it, tokens from there to its end) of a token of the endless stream."""
        rounds, offset = divmod(token, self.round_tokens)
        place = int(np.searchsorted(self._epoch_ends, offset, side="right"))
        begin = int(self._epoch_ends[place - 1]) if place else 0
        return rounds * self.epochs_per_round + place, offset - begin, int(self._epoch_ends[place]) - offset

    def _cut(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """Pieces of tokens start..stop of one epoch."""
        order, ends = self._order(epoch)
        pieces: list[Piece] = []
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document, end = int(order[place]), int(ends[place])
            begin = end - int(self._lengths[document])
            piece_stop = min(stop, end)
            pieces.append(Piece(document, start - begin, piece_stop - begin))
            start = piece_stop
            place += 1
        return pieces

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled documents, each as often as it is laid, and the token offsets at which they end.

        Only the current epochs are kept.
        """
        if epoch not in self._orders:
            # A counter-based generator: epoch n needs no epoch before it, and no state of this process.
            key = np.array([self.seed, epoch], dtype=np.uint64)
            # Sorting raw draws, because numpy keeps those the same between versions, but not `permutation`.
            laid = np.repeat(np.arange(self._lengths.size), self._counts(epoch))
            draws = np.random.Philox(key=key).random_raw(laid.size)
            order = laid[np.argsort(draws, kind="stable")]
            self._orders[epoch] = (order, np.cumsum(self._lengths[order]))
            while len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]
