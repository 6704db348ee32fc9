"""The pair decomposition against the rule it decomposes, written out token by token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.parallel.layout import make_layout
from farspan.parallel.pairs import Pair, PairTable, pairs


def tokens(ranges) -> list[int]:
    return [t for start, stop in ranges for t in range(start, stop)]


def visible_in(pair: Pair) -> list[tuple[int, int]]:
    """(query, key) positions in shards that the attention contract computes for a pair."""
    seen = []
    for t in range(pair.queries.stop - pair.queries.start):
        for s in range(pair.keys.stop - pair.keys.start):
            behind = 0 if pair.offset is None else t + pair.offset - s
            if behind >= 0 and (pair.window is None or behind < pair.window):
                seen.append((pair.queries.start + t, pair.keys.start + s))
    return seen


@st.composite
def cases(draw: st.DrawFn):
    num_ranks = draw(st.sampled_from([1, 2, 4]))
    num_tokens = 2 * num_ranks * draw(st.integers(1, 6))
    bounds = (0, *sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=5))), num_tokens)
    name = draw(st.sampled_from(["contiguous", "zigzag", "document_zigzag"]))
    window = draw(st.none() | st.integers(1, num_tokens + 2))
    chunk = draw(st.none() | st.integers(1, num_tokens + 2))
    return make_layout(name, num_tokens, num_ranks, bounds), bounds, window, chunk


@given(cases())
@settings(max_examples=300, deadline=None)
def test_pairs_cover_exactly_what_is_causal_in_document_in_window_and_in_chunk_each_once(case) -> None:
    layout, bounds, window, chunk = case
    start_of = {t: a for a, b in pairwise(bounds) for t in range(a, b)}
    found: Counter[tuple[int, int]] = Counter()
    for query_rank in range(layout.num_ranks):
        for key_rank in range(layout.num_ranks):
            query_ranges, key_ranges = layout.ranges_of(query_rank), layout.ranges_of(key_rank)
            queries, keys = tokens(query_ranges), tokens(key_ranges)
            for pair in pairs(query_ranges, key_ranges, bounds, window, chunk):
                seen = visible_in(pair)
                # Nothing is computed for a query that sees no key or a key that no query sees.
                assert {q for q, _ in seen} == set(range(pair.queries.start, pair.queries.stop))
                assert {k for _, k in seen} == set(range(pair.keys.start, pair.keys.stop))
                found.update((queries[q], keys[k]) for q, k in seen)
    wanted = {
        (q, k)
        for q in range(layout.num_tokens)
        for k in range(q + 1)
        if start_of[q] == start_of[k]
        and (window is None or q - k < window)
        and (chunk is None or (q - start_of[q]) // chunk == (k - start_of[k]) // chunk)
    }
    assert set(found) == wanted
    assert set(found.values()) == {1}


def test_a_pair_that_is_fully_visible_says_so() -> None:
    (pair,) = pairs([(8, 12)], [(0, 8)], (0, 12))
    assert pair == Pair(slice(0, 4), slice(0, 8), None, None)
    (pair,) = pairs([(8, 12)], [(4, 8)], (0, 12), window=8)
    assert pair == Pair(slice(0, 4), slice(0, 4), None, None)


def test_a_window_cuts_away_the_queries_and_keys_it_hides() -> None:
    (pair,) = pairs([(8, 16)], [(0, 8)], (0, 16), window=3)
    assert pair == Pair(slice(0, 2), slice(6, 8), 2, 3)


def test_no_pair_is_made_for_the_future_or_another_document() -> None:
    assert pairs([(0, 4)], [(4, 8)], (0, 8)) == []
    assert pairs([(4, 8)], [(0, 4)], (0, 4, 8)) == []
    assert pairs([(8, 12)], [(0, 4)], (0, 12), window=4) == []


@pytest.mark.parametrize(("layout", "window", "hops"), [
    ("contiguous", 8, (1,)), ("contiguous", 9, (1,)), ("contiguous", 10, (1, 2)), ("zigzag", 3, (1, 7)),
    ("contiguous", 1, ()), ("zigzag", 1, ()), ("zigzag", None, tuple(range(1, 8))),
    ("document_zigzag", 3, tuple(range(1, 8))),
])  # fmt: skip
def test_hops_at_which_a_window_hides_every_block_are_not_made(layout: str, window: int | None, hops) -> None:
    bounds = (0, 30, 64)
    table = PairTable.of(make_layout(layout, 64, 8, bounds), bounds)
    assert table.hops(window, None) == table.hops(None, window) == hops
    for rank in range(8):
        for other in range(8):
            if (rank - other) % 8 not in (0, *hops):
                assert table.between(rank, other, window, None) == []


def test_a_table_makes_each_list_once() -> None:
    table = PairTable.of(make_layout("zigzag", 32, 2, (0, 32)), (0, 32))
    assert table.between(1, 0, None, None) is table.between(1, 0, None, None)
    assert table.between(1, 0, 3, None) != table.between(1, 0, None, None)
