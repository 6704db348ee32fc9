"""Which tokens of a packed sequence each rank holds: pure index maps with an inverse.

Shapes: T tokens of the sequence, R ranks that share it, t = T / R tokens a rank holds.
A layout is told by the global token ranges of each rank in the order the rank holds them; sharding, gathering and
the pairs of attention all follow from these ranges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from farspan.batch import PackedBatch, ShardedBatch

Range = tuple[int, int]
LAYOUTS = ("contiguous", "zigzag", "document_zigzag")


class Layout(ABC):
    """T tokens on R ranks, T / R each."""

    num_tokens: int
    num_ranks: int

    @property
    def cuts_documents(self) -> bool:
        """Whether which tokens a rank holds depends on the documents of the batch."""
        return False

    @property
    def shard_tokens(self) -> int:
        """Tokens each rank holds: the same for all, because collectives need equal shapes."""
        return self.num_tokens // self.num_ranks

    @abstractmethod
    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        """Global ranges [start, stop) that `rank` holds, in the order it holds them."""

    def index_of(self, rank: int) -> Tensor:
        """index_t: the global position of every token `rank` holds."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.ranges_of(rank)])

    def order(self) -> Tensor:
        """order_T: the global position of every token when the shards are laid end to end."""
        return torch.cat([self.index_of(rank) for rank in range(self.num_ranks)])

    def inverse(self) -> Tensor:
        """inverse_T: where each global token is when the shards are laid end to end."""
        return torch.argsort(self.order())

    def take(self, x_T: Tensor, rank: int) -> Tensor:
        """The rows of `x_T` [T, ...] that `rank` holds."""
        return torch.cat([x_T[start:stop] for start, stop in self.ranges_of(rank)])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """[T, ...] in global order from the shards of every rank: the inverse of `take`."""
        return torch.cat(list(shards)).index_select(0, self.inverse().to(shards[0].device))

    def shard(self, batch: PackedBatch, rank: int) -> ShardedBatch:
        """What `rank` holds of `batch`. Labels were shifted before: no token needs its neighbour."""
        return ShardedBatch(
            tokens_T=self.take(batch.tokens_T, rank),
            labels_T=self.take(batch.labels_T, rank),
            positions_T=self.take(batch.positions_T, rank),
            bounds=batch.bounds,
        )


@dataclass(frozen=True, slots=True)
class ContiguousLayout(Layout):
    """Rank r holds tokens [r * T/R, (r + 1) * T/R): for an exchange by heads, where every rank sees all."""

    num_tokens: int
    num_ranks: int

    def __post_init__(self) -> None:
        _refuse_remainder("contiguous", self.num_tokens, self.num_ranks, "num_ranks", self.num_ranks)

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        return ((rank * self.shard_tokens, (rank + 1) * self.shard_tokens),)


@dataclass(frozen=True, slots=True)
class ZigzagLayout(Layout):
    """The sequence is cut into 2R equal stripes; rank r holds stripe r and its mirror, 2R - 1 - r.

    Every rank pairs cheap early queries with costly late ones, so causal work is equal over ranks.
    """

    num_tokens: int
    num_ranks: int

    def __post_init__(self) -> None:
        _refuse_remainder("zigzag", self.num_tokens, self.num_ranks, "2 * num_ranks", 2 * self.num_ranks)

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        stripe = self.num_tokens // (2 * self.num_ranks)
        return joined((s * stripe, (s + 1) * stripe) for s in (rank, 2 * self.num_ranks - 1 - rank))


@dataclass(frozen=True, slots=True)
class DocumentZigzagLayout(Layout):
    """Every document is cut into 2R stripes on its own, so that work is equal over ranks inside each document too.

    A document of L tokens gives each stripe L // 2R tokens. The L % 2R left over go one each to the next ranks in a
    rotation (rank 0's first stripe .. rank R-1's first stripe, rank 0's second .. rank R-1's second) that carries on
    from document to document. As T is a multiple of R the rotation ends on a whole round over the ranks: all shards
    are equal and no token is dropped or padded.
    """

    num_tokens: int
    num_ranks: int
    bounds: tuple[int, ...]

    @property
    def cuts_documents(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _refuse_remainder("document_zigzag", self.num_tokens, self.num_ranks, "num_ranks", self.num_ranks)
        assert self.bounds[0] == 0, "documents start at token 0"
        assert self.bounds[-1] == self.num_tokens, "documents cover the sequence"

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        num_stripes, dealt = 2 * self.num_ranks, 0
        held: list[Range] = []
        for start, stop in pairwise(self.bounds):
            share, left = divmod(stop - start, num_stripes)
            lucky = {(dealt + i) % num_stripes for i in range(left)}
            dealt += left
            sizes = [share + (self._turn(stripe) in lucky) for stripe in range(num_stripes)]
            edges = list(accumulate(sizes, initial=start))
            held += [(edges[s], edges[s + 1]) for s in (rank, num_stripes - 1 - rank)]
        return joined(held)

    def _turn(self, stripe: int) -> int:
        """When the rotation comes to a stripe: turn i belongs to rank i % R."""
        return stripe if stripe < self.num_ranks else 3 * self.num_ranks - 1 - stripe


@dataclass(frozen=True, slots=True)
class NestedLayout(Layout):
    """Each shard of `outer`, in its order, cut into `inner` equal parts: rank j * inner + i holds part i of shard j."""

    outer: Layout
    inner: int

    def __post_init__(self) -> None:
        if self.outer.shard_tokens % self.inner != 0:
            raise ValueError(
                f"a shard of {self.outer.shard_tokens} tokens cannot be cut into {self.inner} equal parts; "
                f"use {_round_up(self.outer.shard_tokens, self.inner) * self.outer.num_ranks} tokens"
            )

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        return self.outer.num_tokens

    @property
    def cuts_documents(self) -> bool:
        return self.outer.cuts_documents

    @property
    def num_ranks(self) -> int:  # type: ignore[override]
        return self.outer.num_ranks * self.inner

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        shard, part = divmod(rank, self.inner)
        first, last = part * self.shard_tokens, (part + 1) * self.shard_tokens
        held, passed = [], 0
        for start, stop in self.outer.ranges_of(shard):
            a, b = max(start, start + first - passed), min(stop, start + last - passed)
            held.append((a, b))
            passed += stop - start
        return joined(held)


def make_layout(name: str, num_tokens: int, num_ranks: int, bounds: tuple[int, ...], inner: int = 1) -> Layout:
    """The layout called `name`; `inner` neighbouring ranks share one shard of it contiguously (hybrid)."""
    outer: Layout
    if name == "contiguous":
        outer = ContiguousLayout(num_tokens, num_ranks // inner)
    elif name == "zigzag":
        outer = ZigzagLayout(num_tokens, num_ranks // inner)
    else:
        assert name == "document_zigzag", f"layout {name!r}: the config was not checked"
        outer = DocumentZigzagLayout(num_tokens, num_ranks // inner, bounds)
    return outer if inner == 1 else NestedLayout(outer, inner)


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same tokens in the same order with as few ranges as possible: no empty ones, neighbours made one."""
    out: list[Range] = []
    for start, stop in ranges:
        if stop <= start:
            continue
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _refuse_remainder(name: str, num_tokens: int, num_ranks: int, rule: str, multiple: int) -> None:
    if num_tokens % multiple != 0 or num_tokens == 0:
        raise ValueError(
            f"{name} layout needs num_tokens divisible by {rule}, got {num_tokens} tokens on {num_ranks} ranks; "
            f"use {max(multiple, _round_up(num_tokens, multiple))} tokens"
        )
