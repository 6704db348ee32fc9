"""The pack plan: which tokens of which documents make up training sequence number `index`. Pure.

For each epoch the documents are shuffled by (seed, epoch), laid end to end, and the stream of all epochs is cut every
`sequence_tokens` tokens. A document that crosses a cut goes on as a new piece in the next sequence: no token is
dropped, repeated or padded. The plan depends on nothing else, not on the number of workers and not on what was asked
before, so any process can ask for any sequence at any time.
See docs/decisions/0003-pack-plan.md.
"""

from __future__ import annotations

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

    def __init__(self, document_lengths: Sequence[int] | np.ndarray, sequence_tokens: int, seed: int) -> None:
        """`document_lengths` in tokens, each at least 1; `seed` any integer from 0 below 2^64."""
        if sequence_tokens < 1:
            raise ConfigError("data.sequence_tokens", "must be at least 1", sequence_tokens, "use 8192")
        if not 0 <= seed < 2**64:
            raise ConfigError("seed", "must lie in 0..2^64 - 1", seed, "use seed=0")
        self.sequence_tokens = sequence_tokens
        self.seed = seed
        self._lengths = np.asarray(document_lengths, dtype=np.int64)
        if self._lengths.size == 0 or int(self._lengths.min()) < 1:
            raise ConfigError("data.corpus", "must hold documents of at least 1 token", 0, "build it again")
        self.epoch_tokens = int(self._lengths.sum())
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sequence(self, index: int) -> tuple[Piece, ...]:
        """The pieces of sequence `index`, in order; their lengths add up to `sequence_tokens`."""
        if index < 0:
            raise IndexError(f"sequences are counted from 0, got {index}")
        start = index * self.sequence_tokens
        stop = start + self.sequence_tokens
        pieces: list[Piece] = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            wanted = min(stop - start, self.epoch_tokens - offset)
            pieces += self._cut(epoch, offset, offset + wanted)
            start += wanted
        return tuple(pieces)

    def order(self, epoch: int) -> np.ndarray:
        """The documents of one epoch in the order in which they are laid."""
        return self._order(epoch)[0]

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
        """Shuffled documents and the token offsets at which they end. Only the current epochs are kept."""
        if epoch not in self._orders:
            # A counter-based generator: epoch n needs no epoch before it, and no state of this process.
            key = np.array([self.seed, epoch], dtype=np.uint64)
            # Sorting raw draws, because numpy keeps those the same between versions, but not `permutation`.
            draws = np.random.Philox(key=key).random_raw(self._lengths.size)
            order = np.argsort(draws, kind="stable")
            self._orders[epoch] = (order, np.cumsum(self._lengths[order]))
            while len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]
