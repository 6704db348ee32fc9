"""Attention over several ranks against one process and against torch's own attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import RankPool
from tests.support.relative import relative_error

from farspan.parallel.documents import attend_documents
from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import ContiguousLayout
from farspan.parallel.ulysses import UlyssesAttention

BOUNDS = (0, 5, 6, 29, 48)
NUM_TOKENS, HEAD_DIM = 48, 16
# query heads : key heads. 12:3 on 2 and 4 ranks needs key heads repeated to a common multiple.
HEADS = [(8, 2), (4, 1), (4, 4), (12, 3), (8, 8)]


def make(heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [
        (NUM_TOKENS, heads[0], HEAD_DIM),
        *[(NUM_TOKENS, heads[1], HEAD_DIM)] * 2,
        (NUM_TOKENS, heads[0], HEAD_DIM),
    ]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention, one document at a time."""
    parts = []
    for start, stop in pairwise(BOUNDS):
        one = [x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True, scale=0.25)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def with_gradients(attend, q, k, v, dout) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def on_one_rank(heads: tuple[int, int]) -> tuple[list[torch.Tensor], int]:
    exchange = Exchange(dist.group.WORLD)
    held = ContiguousLayout(NUM_TOKENS, exchange.num_ranks).tokens_of(exchange.rank)
    attention = UlyssesAttention(exchange, BOUNDS)
    shards = [x[held] for x in make(heads)]
    return with_gradients(lambda q, k, v: attention(q, k, v, scale=0.25), *shards), exchange.bytes_sent


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_documents_equal_torch_attention_one_document_at_a_time(heads: tuple[int, int]) -> None:
    q, k, v, dout = make(heads)
    want = with_gradients(oracle, q, k, v, dout)
    got = with_gradients(lambda q, k, v: attend_documents(q, k, v, BOUNDS, 0.25), q, k, v, dout)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_ulysses_on_any_number_of_ranks_equals_one_process(
    ranks: RankPool, heads: tuple[int, int], num_ranks: int
) -> None:
    want = with_gradients(oracle, *make(heads))
    answers = ranks.run(on_one_rank, num_ranks, heads)
    for index, theirs in enumerate(want):
        ours = torch.cat([tensors[index] for tensors, _ in answers])
        assert relative_error(ours, theirs) < 1e-12


def test_one_rank_sends_nothing(ranks: RankPool) -> None:
    ((_, sent),) = ranks.run(on_one_rank, 1, (8, 2))
    assert sent == 0


def test_heads_that_do_not_divide_are_refused(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="query heads divisible by sp, got 3 heads on 2 ranks"):
        ranks.run(on_one_rank, 2, (3, 3))


def leak(num_ranks_seen: None = None) -> list[int]:
    """Which positions of the output change when one token of document 2 changes."""
    exchange = Exchange(dist.group.WORLD)
    held = ContiguousLayout(NUM_TOKENS, exchange.num_ranks).tokens_of(exchange.rank)
    attention = UlyssesAttention(exchange, BOUNDS)
    q, k, v, _ = make((8, 2))
    before = attention(q[held], k[held], v[held], scale=0.25)
    for x in (q, k, v):
        x[8] += 1.0
    after = attention(q[held], k[held], v[held], scale=0.25)
    changed = (before != after).flatten(1).any(1)
    return [held.start + int(i) for i in changed.nonzero()]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_changed_token_changes_only_later_tokens_of_its_own_document(ranks: RankPool, num_ranks: int) -> None:
    changed = [position for part in ranks.run(leak, num_ranks) for position in part]
    assert changed == list(range(8, 29))
