"""What the doctor lets a layout compute: small packed sequences that reach every rule. Pure.

Letters: T tokens of a sequence, R ranks that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from farspan.batch import IGNORED_LABEL, PackedBatch

PACKED, SINGLE = "packed documents", "one document"
_TOKENS = 96


@dataclass(frozen=True, slots=True)
class ProbeSequence:
    """Random documents at `bounds`; the labels at positions `masked` teach nothing."""

    bounds: tuple[int, ...]
    seed: int
    masked: tuple[int, ...] = ()

    def tokens(self, vocab: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, vocab, (self.bounds[-1],), generator=generator)

    def batch(self, vocab: int, changed: int | None = None) -> PackedBatch:
        """The sequence as training reads it; `changed` is a position whose token is another one."""
        tokens_T = self.tokens(vocab)
        if changed is not None:
            tokens_T[changed] = (tokens_T[changed] + 1) % vocab
        labels_T = torch.full_like(tokens_T, IGNORED_LABEL)
        positions_T = torch.empty_like(tokens_T)
        for a, b in pairwise(self.bounds):
            labels_T[a : b - 1] = tokens_T[a + 1 : b]
            positions_T[a:b] = torch.arange(b - a)
        labels_T[list(self.masked)] = IGNORED_LABEL
        return PackedBatch(tokens_T, labels_T, positions_T, self.bounds, sample_ids=())


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of one optimizer step."""

    name: str
    sequences: tuple[ProbeSequence, ...]


def num_tokens(num_ranks: int) -> int:
    """Tokens of a probe: what every layout can cut over R ranks."""
    return -(-_TOKENS // (2 * num_ranks)) * 2 * num_ranks


def make_cases(num_ranks: int, held: tuple[int, ...]) -> tuple[Case, ...]:
    """The steps the doctor compares; `held` are the positions that one rank holds in the first of them."""
    total = num_tokens(num_ranks)
    ragged = _ragged(total)
    packed = ProbeSequence(ragged, seed=1)
    single = ProbeSequence((0, total), seed=2)
    some = torch.randperm(total, generator=torch.Generator().manual_seed(3))[: total * 6 // 10]
    sparse = ProbeSequence(ragged, seed=4, masked=tuple(sorted(some.tolist())))
    mute = ProbeSequence(ragged, seed=5, masked=tuple(range(total)))
    cases = (
        Case(PACKED, (packed,)),
        Case(SINGLE, (single,)),
        Case("accumulation of 4", (packed, mute, sparse, single)),
        Case("60 % of the labels masked", (sparse,)),
    )
    if num_ranks == 1:
        return cases
    return (*cases, Case("a rank without labels", (ProbeSequence(ragged, seed=1, masked=held),)))


def leak_positions(sequence: ProbeSequence) -> tuple[int, ...]:
    """Tokens the leak probe changes: one inside each document that has more than one token."""
    return tuple((a + b) // 2 for a, b in pairwise(sequence.bounds) if b - a > 1)


def document_of(bounds: tuple[int, ...], position: int) -> tuple[int, int]:
    """Bounds of the document that holds `position`."""
    return next((a, b) for a, b in pairwise(bounds) if a <= position < b)


def _ragged(total: int) -> tuple[int, ...]:
    # A short document, one of a single token, one that ends off every shard's edge, and a long one.
    return (0, 5, 6, total * 3 // 7, total)
