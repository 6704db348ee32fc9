"""Layouts give every token to one rank, in equal shards, and can be undone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.batch import PackedBatch
from farspan.parallel.layout import (
    ContiguousLayout,
    DocumentZigzagLayout,
    Layout,
    NestedLayout,
    ZigzagLayout,
    make_layout,
)
from farspan.parallel.pairs import PairTable


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    inner = draw(st.sampled_from([1, 2]))
    num_tokens = 2 * num_ranks * inner * draw(st.integers(1, 12))
    cuts = draw(st.sets(st.integers(1, num_tokens - 1), max_size=9))
    bounds = (0, *sorted(cuts), num_tokens)
    name = draw(st.sampled_from(["contiguous", "zigzag", "document_zigzag"]))
    return make_layout(name, num_tokens, num_ranks * inner, bounds, inner)


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_every_token_belongs_to_exactly_one_rank_and_shards_are_equal(layout: Layout) -> None:
    held = [layout.index_of(rank) for rank in range(layout.num_ranks)]
    assert {len(index) for index in held} == {layout.num_tokens // layout.num_ranks}
    assert torch.equal(torch.cat(held).sort().values, torch.arange(layout.num_tokens))


@given(layouts(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_inverse_of_a_layout_brings_every_token_back(layout: Layout, seed: int) -> None:
    x = torch.randn(layout.num_tokens, 3, generator=torch.Generator().manual_seed(seed))
    shards = [layout.take(x, rank) for rank in range(layout.num_ranks)]
    assert torch.equal(layout.join(shards), x)
    assert torch.equal(x[layout.order()][layout.inverse()], x)


@given(st.integers(1, 4), st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_a_document_zigzag_shares_every_document_to_within_two_tokens(
    num_ranks: int, share: int, data: st.DataObject
) -> None:
    num_tokens = num_ranks * share
    cuts = data.draw(st.sets(st.integers(1, max(1, num_tokens - 1)), max_size=6)) - {num_tokens}
    bounds = (0, *sorted(cuts), num_tokens)
    layout = DocumentZigzagLayout(num_tokens, num_ranks, bounds)
    for start, stop in pairwise(bounds):
        counts = [int(((layout.index_of(r) >= start) & (layout.index_of(r) < stop)).sum()) for r in range(num_ranks)]
        assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_zigzag_gives_every_rank_the_same_causal_work_and_contiguous_does_not(num_ranks: int) -> None:
    def work(layout: Layout) -> list[int]:
        return [int((layout.index_of(rank) + 1).sum()) for rank in range(num_ranks)]

    assert len(set(work(ZigzagLayout(64, num_ranks)))) == 1
    contiguous = work(ContiguousLayout(64, num_ranks))
    assert contiguous[-1] > 2 * contiguous[0]


def test_every_rank_of_a_document_zigzag_has_the_same_number_of_scores_in_each_document() -> None:
    bounds = (0, 16, 80, 96)
    table = PairTable.of(DocumentZigzagLayout(96, 4, bounds), bounds)

    def scores(rank: int) -> int:
        met = [pair for other in range(4) for pair in table.between(rank, other, None, None)]
        total = 0
        for pair in met:
            tokens = (pair.queries.stop - pair.queries.start, pair.keys.stop - pair.keys.start)
            total += tokens[0] * tokens[1] if pair.offset is None else tokens[0] * (tokens[0] + 1) // 2
        return total

    assert len({scores(rank) for rank in range(4)}) == 1


def test_a_shard_holds_tokens_labels_and_positions_of_the_same_places() -> None:
    bounds = (0, 5, 16)
    positions = torch.cat([torch.arange(5), torch.arange(11)])
    batch = PackedBatch(torch.arange(16), torch.arange(16) + 100, positions, bounds, (0,))
    for name in ("contiguous", "zigzag", "document_zigzag"):
        layout = make_layout(name, 16, 2, bounds)
        for rank in range(2):
            shard = layout.shard(batch, rank)
            assert torch.equal(shard.tokens_T, layout.index_of(rank))
            assert torch.equal(shard.labels_T, shard.tokens_T + 100)
            assert torch.equal(shard.positions_T, positions[shard.tokens_T])
            assert shard.bounds == bounds


def test_lengths_that_do_not_divide_are_refused_with_the_nearest_legal_length() -> None:
    with pytest.raises(ValueError, match=r"divisible by num_ranks, got 10 tokens on 4 ranks; use 12 tokens"):
        ContiguousLayout(10, 4)
    with pytest.raises(ValueError, match=r"divisible by 2 \* num_ranks, got 12 tokens on 4 ranks; use 16 tokens"):
        ZigzagLayout(12, 4)
    with pytest.raises(ValueError, match=r"divisible by num_ranks, got 10 tokens on 4 ranks; use 12 tokens"):
        DocumentZigzagLayout(10, 4, (0, 10))
    with pytest.raises(ValueError, match=r"a shard of 6 tokens cannot be cut into 4 equal parts; use 16 tokens"):
        NestedLayout(ZigzagLayout(12, 2), 4)
