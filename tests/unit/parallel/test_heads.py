"""Any number of heads on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.parallel.heads import plan_heads


@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 8]))
@settings(max_examples=300, deadline=None)
def test_each_rank_holds_the_key_head_of_every_query_head_it_holds(group: int, kv_heads: int, num_ranks: int) -> None:
    plan = plan_heads(group * kv_heads, kv_heads, num_ranks)
    # Heads carry their own names, counted from 1; 0 is padding.
    queries = torch.arange(1, group * kv_heads + 1).reshape(1, -1, 1)
    keys = torch.arange(1, kv_heads + 1).reshape(1, -1, 1)
    spread_q, spread_k = plan.spread_queries(queries), plan.spread_keys(keys)
    assert spread_q.shape[1] % num_ranks == 0
    assert spread_k.shape[1] % num_ranks == 0
    met = []
    for q_part, k_part in zip(spread_q.chunk(num_ranks, 1), spread_k.chunk(num_ranks, 1), strict=True):
        each = q_part.shape[1] // k_part.shape[1]
        met += [(int(q), int(k_part[0, i // each, 0])) for i, q in enumerate(q_part[0, :, 0]) if q > 0]
    assert sorted(met) == [(h + 1, h // group + 1) for h in range(group * kv_heads)]
    assert torch.equal(plan.collect(spread_q), queries)


@pytest.mark.parametrize(
    ("heads", "num_ranks", "per_rank"),
    [
        ((8, 2), 2, (4, 1)),
        ((8, 2), 4, (2, 1)),
        ((4, 1), 4, (1, 1)),
        ((12, 3), 2, (6, 3)),
        ((3, 3), 2, (2, 2)),
        ((5, 1), 4, (2, 1)),
        ((6, 3), 4, (2, 1)),
    ],
)
def test_no_rank_computes_more_heads_than_an_even_spread_needs(heads, num_ranks, per_rank) -> None:
    plan = plan_heads(*heads, num_ranks)
    assert (plan.q_heads // num_ranks, plan.kv_heads // num_ranks) == per_rank
