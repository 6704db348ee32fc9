"""Which samples a run has consumed, as one hash that every restart and every layout must reproduce.

A rank notes what it reads: sequence number -> hash of its tokens, its bounds and its document numbers. After each step
the notes of all ranks are merged, put in order and chained onto the hash of the steps before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from farspan.batch import PackedBatch
from farspan.data.reader import Reader
from farspan.errors import TrainingError


class WitnessedReader(Reader):
    """A reader that remembers what it gave since it was last asked."""

    _seen: dict[int, str] | None = None

    def batch(self, index: int) -> PackedBatch:
        batch = super().batch(index)
        self._seen = {**(self._seen or {}), index: batch_digest(batch)}
        return batch

    def take(self) -> dict[int, str]:
        """Sequence number -> hash of its content; forgotten afterwards."""
        seen, self._seen = self._seen or {}, None
        return seen


def batch_digest(batch: PackedBatch) -> str:
    """Hash of what a sequence teaches: its tokens, where documents begin, and which documents they are."""
    digest = hashlib.sha256(np.asarray([*batch.bounds, -1, *batch.sample_ids], dtype=np.int64).tobytes())
    digest.update(batch.tokens_T.contiguous().numpy().tobytes())
    return digest.hexdigest()


def chain_samples(before: str, seen_by_rank: Iterable[Mapping[int, str]]) -> str:
    """The hash of a run after a step in which its ranks read these sequences.

    Raises:
        TrainingError: two ranks of one sequence read different content under one number.
    """
    merged: dict[int, str] = {}
    for rank, seen in enumerate(seen_by_rank):
        for index, digest in seen.items():
            if merged.setdefault(index, digest) != digest:
                raise TrainingError(
                    f"rank {rank} read other tokens as sequence {index} than a rank before it: the nodes do not hold "
                    "the same corpus; build it once and give every node the same data.corpus"
                )
    if not merged:
        return before
    digest = hashlib.sha256(before.encode())
    for index in sorted(merged):
        digest.update(f"\n{index} {merged[index]}".encode())
    return digest.hexdigest()
