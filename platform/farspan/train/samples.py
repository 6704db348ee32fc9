"""Which samples a run has consumed, as one hash that every restart and every layout must reproduce.

A sample is one piece of a document at its place in the pack plan. A rank notes each one it reads: a hash of its tokens
and the share of the work on it that is this rank's. After each step the notes of all ranks are merged, put in order and
chained onto the hash of the steps before. Who shares what with whom leaves no trace: shares of one sample add up to 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from farspan.batch import PackedBatch
from farspan.data.pack import PackPlan, Piece
from farspan.data.reader import Corpus, Reader
from farspan.errors import TrainingError
from farspan.train.useful import UsefulWork


class Place(NamedTuple):
    """Where a sample is in the pack plan."""

    sequence: int
    number: int
    """Of the piece in its sequence."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A piece of a document, at its place."""

    place: Place
    piece: Piece

    @property
    def num_tokens(self) -> int:
        return self.piece.num_tokens


class Seen(NamedTuple):
    """One sample that was read."""

    digest: bytes
    """Hash of its content."""
    num_tokens: int
    times: Fraction
    """How often it was computed; one rank's share of it before the notes of all are merged."""
    flops: float
    """Operations it cannot be trained on without; 0: not known."""


class WitnessedReader(Reader):
    """A reader that remembers what it gave since it was last asked."""

    def __init__(
        self,
        corpus: Corpus,
        sequence_tokens: int,
        seed: int,
        work: UsefulWork | None = None,
        ranks_per_sequence: int = 1,
    ) -> None:
        """`work` counts what each sample costs; none: that is not known. `batch` is read by `ranks_per_sequence`."""
        super().__init__(corpus, sequence_tokens, seed)
        self._work = work
        self._share = Fraction(1, ranks_per_sequence)
        self._seen: dict[Place, Seen] = {}

    def batch(self, index: int) -> PackedBatch:
        return self._read(samples_of(self.plan, index), self._share)

    def share(self, samples: Sequence[Sample], num_ranks: int) -> PackedBatch:
        """These samples end to end, for a rank that computes them together with `num_ranks` - 1 others."""
        return self._read(samples, Fraction(1, num_ranks))

    def take(self) -> dict[Place, Seen]:
        """What was read, by its place; forgotten afterwards."""
        seen, self._seen = self._seen, {}
        return seen

    def _read(self, samples: Sequence[Sample], share: Fraction) -> PackedBatch:
        batch = self.lay(tuple(sample.piece for sample in samples))
        for sample, start in zip(samples, batch.bounds[:-1], strict=True):
            digest = sample_digest(sample.piece, batch.tokens_T[start : start + sample.num_tokens].numpy())
            flops = 0.0 if self._work is None else self._work.flops((0, sample.num_tokens))
            _add(self._seen, sample.place, Seen(digest, sample.num_tokens, share, flops))
        return batch


def samples_of(plan: PackPlan, sequence: int) -> tuple[Sample, ...]:
    """The samples of one sequence, in order."""
    return tuple(Sample(Place(sequence, n), piece) for n, piece in enumerate(plan.sequence(sequence)))


def sample_digest(piece: Piece, tokens: np.ndarray) -> bytes:
    """Hash of what a sample teaches: its tokens, and which of which document they are."""
    digest = hashlib.sha256(np.asarray([piece.document, piece.start, piece.stop], dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(tokens, dtype=np.int64).tobytes())
    return digest.digest()


def merge_seen(seen_by_rank: Iterable[Mapping[Place, Seen]]) -> dict[Place, Seen]:
    """Each sample once, in order, with how often the ranks together computed it.

    Raises:
        TrainingError: two ranks read different content at one place.
    """
    merged: dict[Place, Seen] = {}
    for rank, seen in enumerate(seen_by_rank):
        for place, one in seen.items():
            if place in merged and merged[place].digest != one.digest:
                raise TrainingError(
                    f"rank {rank} read other tokens as sequence {place.sequence} than a rank before it: the nodes do "
                    "not hold the same corpus; build it once and give every node the same data.corpus"
                )
            _add(merged, place, one)
    return dict(sorted(merged.items()))


def refuse_uneven(merged: Mapping[Place, Seen], num_tokens: int) -> None:
    """Stop a run that did not compute every sample of a step's `num_tokens` exactly once: its gradients were wrong.

    Raises:
        TrainingError: what is missing or was computed twice.
    """
    way_out = "go on from the newest checkpoint with parallel.hdp=false, and report it"
    for place, one in merged.items():
        if one.times != 1:
            where = f"piece {place.number} of sequence {place.sequence}"
            raise TrainingError(f"{where} was computed {one.times} times in a step instead of once; {way_out}")
    found = sum(one.num_tokens for one in merged.values())
    if found != num_tokens:
        raise TrainingError(f"{found} of the {num_tokens} tokens of a step were computed; {way_out}")


def chain_samples(before: str, merged: Mapping[Place, Seen]) -> str:
    """The hash of a run after a step that consumed these samples, given in order."""
    if not merged:
        return before
    digest = hashlib.sha256(before.encode())
    for place, seen in merged.items():
        digest.update(f"\n{place.sequence} {place.number} {seen.times} ".encode() + seen.digest)
    return digest.hexdigest()


def _add(seen: dict[Place, Seen], place: Place, one: Seen) -> None:
    before = seen.get(place)
    seen[place] = one if before is None else one._replace(times=before.times + one.times)
