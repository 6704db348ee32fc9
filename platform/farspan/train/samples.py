"""Which samples a run has consumed, as one hash that every restart and every layout must reproduce.

A rank notes what it reads: sequence number -> hash of its tokens, its bounds and its document numbers. After each step
the notes of all ranks are merged, put in order and chained onto the hash of the steps before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from farspan.batch import PackedBatch
from farspan.data.reader import Corpus, Reader
from farspan.errors import TrainingError
from farspan.train.useful import UsefulWork


class Seen(NamedTuple):
    """One sequence that was read."""

    digest: str
    """Hash of its content."""
    flops: float
    """Operations it cannot be trained on without; 0: not known."""


class WitnessedReader(Reader):
    """A reader that remembers what it gave since it was last asked."""

    def __init__(self, corpus: Corpus, sequence_tokens: int, seed: int, work: UsefulWork | None = None) -> None:
        """`work` counts what each sequence costs; none: that is not known."""
        super().__init__(corpus, sequence_tokens, seed)
        self._work = work
        self._seen: dict[int, Seen] = {}

    def batch(self, index: int) -> PackedBatch:
        batch = super().batch(index)
        flops = 0.0 if self._work is None else self._work.flops(batch.bounds)
        self._seen[index] = Seen(batch_digest(batch), flops)
        return batch

    def take(self) -> dict[int, Seen]:
        """What was read, by sequence number; forgotten afterwards."""
        seen, self._seen = self._seen, {}
        return seen


def batch_digest(batch: PackedBatch) -> str:
    """Hash of what a sequence teaches: its tokens, where documents begin, and which documents they are."""
    digest = hashlib.sha256(np.asarray([*batch.bounds, -1, *batch.sample_ids], dtype=np.int64).tobytes())
    digest.update(batch.tokens_T.contiguous().numpy().tobytes())
    return digest.hexdigest()


def merge_seen(seen_by_rank: Iterable[Mapping[int, Seen]]) -> dict[int, Seen]:
    """Each sequence once, in order; the ranks that share one have all read it.

    Raises:
        TrainingError: two ranks of one sequence read different content under one number.
    """
    merged: dict[int, Seen] = {}
    for rank, seen in enumerate(seen_by_rank):
        for index, one in seen.items():
            if merged.setdefault(index, one).digest != one.digest:
                raise TrainingError(
                    f"rank {rank} read other tokens as sequence {index} than a rank before it: the nodes do not hold "
                    "the same corpus; build it once and give every node the same data.corpus"
                )
    return dict(sorted(merged.items()))


def chain_samples(before: str, merged: Mapping[int, Seen]) -> str:
    """The hash of a run after a step that consumed these sequences, given in order."""
    if not merged:
        return before
    digest = hashlib.sha256(before.encode())
    for index, seen in merged.items():
        digest.update(f"\n{index} {seen.digest}".encode())
    return digest.hexdigest()
