"""Hybrid: Ulysses among neighbours inside, a ring of such groups outside.

Letters: U ranks inside (ulysses), R rings' ranks outside (ring); sp = R * U, rank = ring rank * U + ulysses rank.
The exchange by heads stays on the fast links of one machine, the ring's hops hide behind computation between machines,
and heads limit only U.
Source: USP (Fang and Zhao 2024, https://arxiv.org/abs/2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence

from farspan.parallel import ring
from farspan.parallel import ulysses as heads_exchange
from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import Layout, joined
from farspan.parallel.pairs import PairTable
from farspan.parallel.ring import RingAttention
from farspan.parallel.traffic import Block, Traffic
from farspan.parallel.ulysses import UlyssesAttention


def hybrid_attention(ulysses: Exchange, ring: Exchange, layout: Layout, bounds: Sequence[int]) -> UlyssesAttention:
    """Ulysses over `ulysses` around a ring over `ring`."""
    inside = RingAttention(ring, group_table(layout, bounds, ulysses.num_ranks))
    # One stage: the ring hides its own hops, and two kinds of transfer at once would only share the links.
    return UlyssesAttention(ulysses, inside, max_stages=1)


def group_table(layout: Layout, bounds: Sequence[int], inner: int) -> PairTable:
    """Pairs between groups of `inner` neighbouring ranks, whose tokens lie end to end after the exchange by heads."""
    groups = range(0, layout.num_ranks, inner)
    ranges = tuple(joined(r for rank in range(g, g + inner) for r in layout.ranges_of(rank)) for g in groups)
    return PairTable(ranges, tuple(bounds), not layout.cuts_documents)


def bytes_sent(block: Block, num_ulysses: int, num_ring: int, num_hops: int | None = None) -> Traffic:
    """The exchange by heads, and the ring over what it leaves on a rank."""
    inside = heads_exchange.bytes_sent(block, num_ulysses)
    outside = ring.bytes_sent(heads_exchange.inner_block(block, num_ulysses), num_ring, num_hops)
    return Traffic(inside.forward + outside.forward, inside.backward + outside.backward)
