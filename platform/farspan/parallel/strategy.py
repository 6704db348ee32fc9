"""From names in a config to the attention of one packed sequence.

The ranks of a sequence are given as exchanges over their process groups; nothing here knows the default group, so each
sequence may have its own ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.parallel import allgather, hybrid, ring, tokenring, ulysses
from farspan.parallel.allgather import AllGatherAttention
from farspan.parallel.blockwise import Strategy
from farspan.parallel.documents import LocalAttention
from farspan.parallel.exchange import Counter, Exchange
from farspan.parallel.hybrid import group_table, hybrid_attention
from farspan.parallel.layout import Layout, make_layout
from farspan.parallel.mesh import Mesh
from farspan.parallel.pairs import PairTable
from farspan.parallel.ring import RingAttention
from farspan.parallel.tokenring import TokenRingAttention
from farspan.parallel.traffic import Block, Traffic
from farspan.parallel.ulysses import UlyssesAttention

STRATEGIES = ("ulysses", "ring", "tokenring", "hybrid", "allgather")


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that share one sequence: all of them, and as a ring of groups that exchange heads."""

    all: Exchange
    ring: Exchange
    ulysses: Exchange

    @classmethod
    def of(cls, mesh: Mesh) -> SequenceRanks:
        """This rank's, with one counter of bytes for all three."""
        counter = Counter()
        return cls(*(Exchange(group, counter) for group in (mesh.sp_group, mesh.ring_group, mesh.ulysses_group)))


def make_strategy(name: str, ranks: SequenceRanks, layout: Layout, bounds: Sequence[int]) -> Strategy:
    """Attention by the strategy called `name` over documents at `bounds` that lie over `ranks` as `layout` says."""
    assert layout.num_ranks == ranks.all.num_ranks, "the layout is of these ranks"
    if name == "ulysses":
        return UlyssesAttention(ranks.all, LocalAttention(group_table(layout, bounds, ranks.all.num_ranks)))
    if name == "hybrid":
        return hybrid_attention(ranks.ulysses, ranks.ring, layout, bounds)
    table = PairTable.of(layout, bounds)
    if name == "ring":
        return RingAttention(ranks.all, table)
    if name == "tokenring":
        return TokenRingAttention(ranks.all, table)
    assert name == "allgather", f"strategy {name!r}: the config was not checked"
    return AllGatherAttention(ranks.all, table)


def choose_layout(strategy: str, layout: str, num_ring: int) -> str:
    """`auto`: contiguous where every rank computes all tokens of its heads, else zigzag, which balances causal work."""
    if num_ring == 1:
        return "contiguous"
    if layout != "auto":
        return layout
    return "contiguous" if strategy == "ulysses" else "zigzag"


def lay_out(
    strategy: str, layout: str, num_tokens: int, num_ranks: int, num_ulysses: int, bounds: tuple[int, ...]
) -> Layout:
    """The layout of one sequence over `num_ranks` ranks, of which `num_ulysses` neighbours exchange heads (hybrid)."""
    inner = num_ulysses if strategy == "hybrid" else 1
    return make_layout(choose_layout(strategy, layout, num_ranks // inner), num_tokens, num_ranks, bounds, inner)


@dataclass(frozen=True)
class SequenceParallel:
    """How a run shares its sequences: the ranks of this one, and the names of strategy and layout."""

    ranks: SequenceRanks
    strategy: str
    layout: str = "auto"

    def lay_out(self, num_tokens: int, bounds: tuple[int, ...]) -> Layout:
        """Which tokens of a sequence with documents at `bounds` each rank holds."""
        num_ranks, num_ulysses = self.ranks.all.num_ranks, self.ranks.ulysses.num_ranks
        return lay_out(self.strategy, self.layout, num_tokens, num_ranks, num_ulysses, bounds)

    def attention(self, layout: Layout, bounds: Sequence[int]) -> Strategy:
        """Attention of that sequence."""
        return make_strategy(self.strategy, self.ranks, layout, bounds)


def count_hops(strategy: str, layout: Layout, num_ulysses: int, window: int | None, chunk: int | None) -> int:
    """Hops of a ring over `layout` in a layer of that window or chunk; 0 where nothing is passed from rank to rank."""
    if strategy not in ("ring", "tokenring", "hybrid"):
        return 0
    inner = num_ulysses if strategy == "hybrid" else 1
    return len(group_table(layout, (0, layout.num_tokens), inner).hops(window, chunk))


def bytes_sent(strategy: str, block: Block, num_ranks: int, num_ulysses: int, num_hops: int | None = None) -> Traffic:
    """Bytes one rank sends for one layer of one sequence; `num_hops`: see `count_hops`, none for all of them."""
    if strategy == "hybrid":
        return hybrid.bytes_sent(block, num_ulysses, num_ranks // num_ulysses, num_hops)
    if strategy in ("ring", "tokenring"):
        return {"ring": ring, "tokenring": tokenring}[strategy].bytes_sent(block, num_ranks, num_hops)
    rooms = {"ulysses": ulysses, "allgather": allgather}
    return rooms[strategy].bytes_sent(block, num_ranks)
