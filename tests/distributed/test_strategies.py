"""Attention over several ranks against one process: every strategy, layout, head count and layer rule."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from tests.support.ranks import RankPool
from tests.support.relative import relative_error

from farspan.parallel import switch
from farspan.parallel.allgather import AllGatherAttention
from farspan.parallel.documents import LocalAttention, attend_documents
from farspan.parallel.exchange import Exchange
from farspan.parallel.hybrid import group_table
from farspan.parallel.layout import Layout, make_layout
from farspan.parallel.mesh import make_mesh
from farspan.parallel.pairs import PairTable
from farspan.parallel.ring import RingAttention
from farspan.parallel.strategy import STRATEGIES, SequenceRanks, bytes_sent, count_hops, lay_out, make_strategy
from farspan.parallel.switch import LayoutSwitch
from farspan.parallel.tokenring import TokenRingAttention
from farspan.parallel.traffic import Block
from farspan.parallel.ulysses import UlyssesAttention

NUM_TOKENS, HEAD_DIM, SCALE = 96, 16, 0.25
# Ragged on purpose: a document of one token, documents that end inside, at and far from the edges of shards.
BOUNDS = (0, 5, 6, 47, 48, 91, 96)


@dataclass(frozen=True)
class Case:
    """One attention: how many heads, which documents, which layer rule."""

    heads: tuple[int, int] = (8, 2)
    bounds: tuple[int, ...] = BOUNDS
    layout: str = "auto"
    value_dim: int = HEAD_DIM
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def rule(self) -> dict[str, float | int | None]:
        return {"scale": SCALE, "window": self.window, "softcap": self.softcap, "chunk": self.chunk}


CASES = [
    Case(),
    Case(bounds=(0, NUM_TOKENS)),
    Case(layout="contiguous"),
    Case(layout="zigzag"),
    Case(layout="document_zigzag"),
    Case(heads=(4, 1)),
    Case(heads=(8, 8)),
    Case(heads=(6, 3)),
    Case(heads=(5, 1)),
    Case(heads=(6, 2)),
    Case(heads=(3, 3), value_dim=24),
    Case(window=7),
    Case(window=7, bounds=(0, NUM_TOKENS), layout="document_zigzag"),
    Case(window=40, bounds=(0, NUM_TOKENS)),
    Case(window=9, layout="contiguous"),
    Case(softcap=1.5),
    Case(softcap=1.5, window=7, heads=(4, 1), layout="document_zigzag"),
    Case(chunk=16),
    Case(chunk=16, bounds=(0, NUM_TOKENS), layout="contiguous", heads=(4, 1)),
    Case(sinks=True),
    Case(sinks=True, window=7, layout="document_zigzag", heads=(6, 3), value_dim=24),
    Case(sinks=True, chunk=16, softcap=1.5, heads=(5, 1)),
    Case(sinks=True, heads=(16, 16), bounds=(0, NUM_TOKENS)),
]


def make_sinks(case: Case) -> torch.Tensor:
    """A logit per query head: some sinks nobody sees, some that swallow most of the softmax."""
    return torch.linspace(-2.0, 4.0, case.heads[0], dtype=torch.float64).to(case.dtype)


def make(case: Case) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, of the whole sequence."""
    generator = torch.Generator().manual_seed(1)
    q_heads, kv_heads = case.heads
    sizes = [(q_heads, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, case.value_dim), (q_heads, case.value_dim)]
    return [torch.randn((NUM_TOKENS, *s), generator=generator, dtype=torch.float64).to(case.dtype) for s in sizes]


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """A softmax over the visible keys, written out, one document at a time; torch's own where it knows the rule."""
    parts = []
    for start, stop in pairwise(case.bounds):
        one = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        if (case.window, case.softcap, case.chunk, sinks) == (None, None, None, None):
            batched = [x.unsqueeze(0) for x in one]
            out = torch.nn.functional.scaled_dot_product_attention(
                *batched, is_causal=True, enable_gqa=True, scale=SCALE
            )[0]
        else:
            out = written_out(*one, case, sinks)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, sinks: torch.Tensor | None
) -> torch.Tensor:
    k, v = (x.repeat_interleave(case.heads[0] // case.heads[1], dim=0) for x in (k, v))
    place = torch.arange(q.shape[1])
    behind = place[:, None] - place
    seen = behind >= 0
    if case.window is not None:
        seen &= behind < case.window
    if case.chunk is not None:
        seen &= place[:, None] // case.chunk == place // case.chunk
    scores = q @ k.transpose(1, 2) * SCALE
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(place), 1)], dim=2)
    return scores.softmax(-1)[:, :, : len(place)] @ v


def with_gradients(attend, q, k, v, dout, sinks: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[out, dq, dk, dv] and, with sinks, their gradient."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out = attend(*leaves[:3]) if sinks is None else attend(*leaves[:3], sinks_H=leaves[3])
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def whole(case: Case, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """What one process finds, computed in `dtype` (by default the case's own) from the case's numbers."""
    tensors, sinks = make(case), make_sinks(case) if case.sinks else None
    if dtype is not None:
        tensors, sinks = [x.to(dtype) for x in tensors], None if sinks is None else sinks.to(dtype)
    return with_gradients(lambda q, k, v, sinks_H=None: oracle(q, k, v, case, sinks_H), *tensors, sinks)


def names_on(num_ranks: int) -> list[tuple[str, int]]:
    """(strategy, ulysses ranks) on `num_ranks`; four ranks make a true hybrid, 2 x 2."""
    inner = {"hybrid": 2 if num_ranks == 4 else 1, "ulysses": num_ranks}
    return [(name, inner.get(name, 1)) for name in STRATEGIES]


def on_one_rank(name: str, ulysses: int, cases: list[Case]) -> list[tuple[list[torch.Tensor], int]]:
    """([out, dq, dk, dv] of the tokens held, and dsinks of this rank; bytes sent) of every case."""
    ranks = SequenceRanks.of(make_mesh("cpu", torch.distributed.get_world_size(), ulysses, timeout_s=120))
    answers = []
    for case in cases:
        layout = layout_of(name, ulysses, case, ranks.all.num_ranks)
        attention = make_strategy(name, ranks, layout, case.bounds)
        before = ranks.all.bytes_sent
        shards = [layout.take(x, ranks.all.rank) for x in make(case)]
        sinks = make_sinks(case) if case.sinks else None
        got = with_gradients(lambda *x, a=attention, c=case, **s: a(*x, **c.rule, **s), *shards, sinks)
        answers.append((got, ranks.all.bytes_sent - before))
    return answers


def layout_of(name: str, ulysses: int, case: Case, num_ranks: int) -> Layout:
    return lay_out(name, case.layout, NUM_TOKENS, num_ranks, ulysses, case.bounds)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_equals_torch_attention_one_document_at_a_time(case: Case) -> None:
    sinks = make_sinks(case) if case.sinks else None
    got = with_gradients(lambda *x, **s: attend_documents(*x, case.bounds, **case.rule, **s), *make(case), sinks)
    for ours, theirs in zip(got, whole(case), strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_equals_one_process_and_sends_what_its_formula_says(
    ranks: RankPool, name: str, num_ranks: int
) -> None:
    ulysses = dict(names_on(num_ranks))[name]
    answers = ranks.run(on_one_rank, num_ranks, name, ulysses, CASES)
    for index, case in enumerate(CASES):
        layout = layout_of(name, ulysses, case, num_ranks)
        block = Block(NUM_TOKENS // num_ranks, *case.heads, HEAD_DIM, case.value_dim, itemsize=8)
        hops = count_hops(name, layout, ulysses, case.window, case.chunk)
        assert {answer[index][1] for answer in answers} == {sum(bytes_sent(name, block, num_ranks, ulysses, hops))}, (
            case
        )
        for part, theirs in enumerate(whole(case)):
            parts = [answer[index][0][part] for answer in answers]
            # The gradient of a weight is the sum of what the ranks found; that of tokens lies where they are held.
            ours = torch.stack(parts).sum(0) if part == 4 else layout.join(parts)
            assert relative_error(ours, theirs) < 1e-12, (case, ("out", "dq", "dk", "dv", "dsinks")[part])


BF16 = [
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.bfloat16, bounds=(0, NUM_TOKENS), heads=(4, 1)),
    Case(dtype=torch.bfloat16, sinks=True),
]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_on_many_ranks_is_as_good_as_bf16_in_one_process(ranks: RankPool, name: str, num_ranks: int) -> None:
    ulysses = dict(names_on(num_ranks))[name]
    answers = ranks.run(on_one_rank, num_ranks, name, ulysses, BF16)
    for index, case in enumerate(BF16):
        layout = layout_of(name, ulysses, case, num_ranks)
        block = Block(NUM_TOKENS // num_ranks, *case.heads, HEAD_DIM, case.value_dim, itemsize=2)
        assert {answer[index][1] for answer in answers} == {sum(bytes_sent(name, block, num_ranks, ulysses))}
        for part, (theirs, alone) in enumerate(zip(whole(case, torch.float64), whole(case), strict=True)):
            parts = [answer[index][0][part] for answer in answers]
            ours = torch.stack(parts).float().sum(0) if part == 4 else layout.join(parts)
            assert relative_error(ours, theirs) < 1.5 * relative_error(alone, theirs), (name, case, part)


def staged(case: Case) -> list[tuple[list[torch.Tensor], int]]:
    """(out, dq, dk, dv and dsinks of this rank, bytes sent) of Ulysses in one, two and four stages."""
    exchange = Exchange(torch.distributed.group.WORLD)
    layout = layout_of("ulysses", exchange.num_ranks, case, exchange.num_ranks)
    inside = LocalAttention(group_table(layout, case.bounds, exchange.num_ranks))
    shards, answers = [layout.take(x, exchange.rank) for x in make(case)], []
    for stages in (1, 2, 4):
        attention, before = UlyssesAttention(exchange, inside, max_stages=stages), exchange.bytes_sent
        got = with_gradients(lambda *x, a=attention, **s: a(*x, **case.rule, **s), *shards, make_sinks(case))
        answers.append((got, exchange.bytes_sent - before))
    return answers


def test_ulysses_in_stages_equals_ulysses_in_one_exchange_and_sends_the_same(ranks: RankPool) -> None:
    for answers in ranks.run(staged, 2, Case(heads=(16, 8), sinks=True, window=7)):
        want, bytes_of_one = answers[0]
        for got, bytes_of_many in answers[1:]:
            assert bytes_of_many == bytes_of_one > 0
            for ours, theirs in zip(got, want, strict=True):
                assert relative_error(ours, theirs) < 1e-14


def leak(name: str, ulysses: int, case: Case, place: int) -> list[int]:
    """Which global positions of out change when one token changes."""
    ranks = SequenceRanks.of(make_mesh("cpu", torch.distributed.get_world_size(), ulysses, timeout_s=120))
    layout = layout_of(name, ulysses, case, ranks.all.num_ranks)
    attention = make_strategy(name, ranks, layout, case.bounds)
    tensors = make(case)[:3]
    before = attention(*(layout.take(x, ranks.all.rank) for x in tensors), **case.rule)
    for x in tensors:
        x[place] += 1.0
    after = attention(*(layout.take(x, ranks.all.rank) for x in tensors), **case.rule)
    changed = (before != after).flatten(1).any(1)
    return layout.index_of(ranks.all.rank)[changed].tolist()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_changed_token_changes_only_what_may_see_it(ranks: RankPool, name: str, num_ranks: int) -> None:
    ulysses = dict(names_on(num_ranks))[name]
    for case, last in ((Case(layout="document_zigzag"), 47), (Case(window=7), 18), (Case(chunk=16), 22)):
        changed = [place for part in ranks.run(leak, num_ranks, name, ulysses, case, 11) for place in part]
        assert sorted(changed) == list(range(11, last)), case


def switched(layout: Layout) -> tuple[bool, bool, bool, int]:
    """(channels hold the sequence, tokens come back, gradient comes back, bytes sent) of a switch there and back."""
    exchange = Exchange(torch.distributed.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    whole_TWX, weight_TWX = (torch.randn(NUM_TOKENS, 8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    held = layout.take(whole_TWX, exchange.rank).requires_grad_()
    there_and_back = LayoutSwitch(exchange, layout)
    channels = there_and_back.to_channels(held)
    width = 8 // exchange.num_ranks
    mine = slice(exchange.rank * width, (exchange.rank + 1) * width)
    # What a recurrent layer does: mix along the whole sequence, each channel alone.
    mixed = there_and_back.to_tokens(channels.cumsum(0))
    mixed.backward(layout.take(weight_TWX, exchange.rank))
    want = weight_TWX.flip(0).cumsum(0).flip(0)
    return (
        torch.equal(channels, whole_TWX[:, mine]),
        torch.equal(mixed, layout.take(whole_TWX.cumsum(0), exchange.rank)),
        relative_error(held.grad, layout.take(want, exchange.rank)) < 1e-14,
        exchange.bytes_sent,
    )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "document_zigzag"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_layout_switch_gives_a_recurrent_layer_the_sequence_and_its_gradient_back(
    ranks: RankPool, layout: str, num_ranks: int
) -> None:
    laid = make_layout(layout, NUM_TOKENS, num_ranks, BOUNDS)
    one_way = switch.bytes_sent(NUM_TOKENS // num_ranks, 8 * 3, 8, num_ranks)
    for forward, back, gradient, sent in ranks.run(switched, num_ranks, laid):
        assert (forward, back, gradient) == (True, True, True)
        assert sent == 2 * sum(one_way)


ONE_AND_THREE = (((0,), (0, 30, 48)), ((1, 2, 3), BOUNDS))


def on_my_own_ranks(strategy: type) -> tuple[list[torch.Tensor], int]:
    """Two sequences at the same time: a short one on rank 0 alone, a long one on ranks 1 to 3."""
    groups = [torch.distributed.new_group(list(members)) for members, _ in ONE_AND_THREE]
    mine = 0 if torch.distributed.get_rank() == 0 else 1
    exchange, case = Exchange(groups[mine]), Case(bounds=ONE_AND_THREE[mine][1])
    layout = make_layout("document_zigzag", case.bounds[-1], exchange.num_ranks, case.bounds)
    attention = strategy(exchange, PairTable.of(layout, case.bounds))
    shards = [layout.take(x[: case.bounds[-1]], exchange.rank) for x in make(case)]
    return with_gradients(lambda q, k, v: attention(q, k, v, **case.rule), *shards), exchange.bytes_sent


@pytest.mark.parametrize("strategy", [RingAttention, TokenRingAttention, AllGatherAttention])
def test_sequences_on_rank_sets_of_their_own_equal_one_process(ranks: RankPool, strategy: type) -> None:
    answers = ranks.run(on_my_own_ranks, 4, strategy)
    assert answers[0][1] == 0
    for members, bounds in ONE_AND_THREE:
        case = Case(bounds=bounds)
        layout = make_layout("document_zigzag", bounds[-1], len(members), bounds)
        cut = [x[: bounds[-1]] for x in make(case)]
        want = with_gradients(lambda q, k, v, c=case: oracle(q, k, v, c), *cut)
        for part, theirs in enumerate(want):
            ours = layout.join([answers[rank][0][part] for rank in members])
            assert relative_error(ours, theirs) < 1e-12
