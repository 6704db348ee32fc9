"""What travels is under way while something is computed: the order of events, without processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention.reference import visible
from farspan.parallel import blockwise
from farspan.parallel.allgather import AllGatherAttention
from farspan.parallel.blockwise import Rule, attend_pair
from farspan.parallel.layout import ZigzagLayout, make_layout
from farspan.parallel.pairs import Pair, PairTable
from farspan.parallel.ring import RingAttention
from farspan.parallel.tokenring import TokenRingAttention
from farspan.parallel.ulysses import UlyssesAttention

NUM_RANKS = 4


@dataclass
class Loop:
    """An exchange whose every rank is this one; it writes down what happens."""

    events: list[str]
    rank: int = 0
    num_ranks: int = NUM_RANKS

    def pass_on(self, tensors: Sequence[Tensor], distance: int = 1) -> Arrival:
        return self._start(f"{distance:+d}", tuple(tensors))

    def gather(self, tensors: Sequence[Tensor]) -> Arrival:
        return self._start("gather", tuple(torch.stack([x] * NUM_RANKS) for x in tensors))

    def sum_rows(self, tensors: Sequence[Tensor]) -> Arrival:
        return self._start("sum", tuple(x[0] for x in tensors))

    def swap(self, x: Tensor) -> Swapped:
        self.events.append("start swap")
        return Swapped(self.events, x)

    def _start(self, name: str, tensors: tuple[Tensor, ...]) -> Arrival:
        self.events.append(f"start {name}")
        return Arrival(self.events, name, tensors)


@dataclass
class Arrival:
    """A transfer that arrived at once."""

    events: list[str]
    name: str
    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        self.events.append(f"wait {self.name}")
        return self.tensors


@dataclass
class Swapped:
    """A swap among ranks that all hold the same."""

    events: list[str]
    x: Tensor

    def wait(self) -> Tensor:
        self.events.append("wait swap")
        return self.x


@dataclass(frozen=True, slots=True)
class Watched(PairTable):
    """Says when pairs are about to be computed."""

    events: list[str] = field(default_factory=list, compare=False)

    def between(self, query_rank: int, key_rank: int, window: int | None, chunk: int | None) -> list[Pair]:
        self.events.append("compute")
        return PairTable.between(self, query_rank, key_rank, window, chunk)


def events_of(strategy: type, *, backward: bool) -> list[str]:
    events: list[str] = []
    layout = ZigzagLayout(64, NUM_RANKS)
    table = Watched(tuple(layout.ranges_of(r) for r in range(NUM_RANKS)), (0, 64), events=events)
    q, k, v = (torch.randn(16, heads, 8).requires_grad_() for heads in (4, 2, 2))
    out = strategy(Loop(events), table)(q, k, v, scale=0.3)
    if backward:
        events.clear()
        out.sum().backward()
    return events


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "document_zigzag"])
@pytest.mark.parametrize("strategy", [RingAttention, TokenRingAttention, AllGatherAttention])
def test_only_blocks_that_somebody_sees_are_computed_and_each_once(
    strategy: type, layout: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds, computed, seen = (0, 21, 64), 0, 0

    def attend(q: Tensor, k: Tensor, v: Tensor, pair: Pair, rule: Rule) -> tuple[Tensor, Tensor]:
        nonlocal computed, seen
        shape = (pair.queries.stop - pair.queries.start, pair.keys.stop - pair.keys.start)
        band = torch.ones(shape, dtype=torch.bool)
        if pair.offset is not None:
            band = visible(*shape, pair.offset, pair.window, q.device)
        assert bool(band.any(1).all() and band.any(0).all()), "no row and no column is computed in vain"
        computed, seen = computed + 1, seen + int(band.sum())
        return attend_pair(q, k, v, pair, rule)

    monkeypatch.setattr(blockwise, "attend_pair", attend)
    laid = make_layout(layout, 64, NUM_RANKS, bounds)
    table = PairTable.of(laid, bounds)
    for rank in range(NUM_RANKS):
        q, k, v = (torch.randn(16, heads, 8) for heads in (4, 2, 2))
        strategy(Loop([], rank), table)(q, k, v, scale=0.3, window=window)
    pairs_of = [len(table.between(a, b, window, None)) for a in range(NUM_RANKS) for b in range(NUM_RANKS)]
    assert computed == sum(pairs_of)
    assert seen == sum(int(visible(b - a, b - a, 0, window, torch.device("cpu")).sum()) for a, b in pairwise(bounds))


def test_a_ring_starts_the_next_block_before_it_computes_the_current_one() -> None:
    events = events_of(RingAttention, backward=False)
    assert events == ["start +1", "compute", "wait +1"] * 3 + ["compute"]


def test_a_ring_computes_while_gradients_travel() -> None:
    events = events_of(RingAttention, backward=True)
    first = ["start +1", "compute", "start +1", "wait +1"]
    middle = ["start +1", "compute", "wait +1", "start +1", "wait +1"]
    assert events == [*first, *middle, *middle, "compute", "wait +1", "start +1", "wait +1"]


def test_a_token_ring_returns_what_it_found_while_the_next_queries_are_computed() -> None:
    events = events_of(TokenRingAttention, backward=False)
    for hop in (1, 2):
        sent, received = events.index(f"start -{hop}"), events.index(f"wait -{hop}")
        assert "compute" in events[sent:received], hop
    assert events[:3] == ["start +1", "compute", "wait +1"]


def test_ulysses_exchanges_the_next_key_heads_while_it_computes() -> None:
    events: list[str] = []

    def inside(q: Tensor, k: Tensor, v: Tensor, **_rule: object) -> Tensor:
        events.append("compute")
        return q

    # Sixteen key heads on four ranks are four for each: four stages of one.
    q, k, v = (torch.randn(4, heads, 8) for heads in (32, 16, 16))
    out = UlyssesAttention(Loop(events), inside, max_stages=4)(q, k, v, scale=0.3)
    assert out.shape == q.shape
    stage = ["wait swap", "start swap", "compute", "start swap"]
    assert events == ["start swap", *stage * 3, "wait swap", "compute", "start swap", *["wait swap"] * 4]


@pytest.mark.parametrize("backward", [False, True])
def test_an_all_gather_computes_its_own_block_while_the_others_arrive(backward: bool) -> None:
    events = events_of(AllGatherAttention, backward=backward)
    assert events[:3] == ["start gather", "compute", "wait gather"]
