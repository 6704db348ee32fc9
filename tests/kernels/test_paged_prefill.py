"""Attention of prompts over pages by matrix tiles: as exact as bf16 is, and the same bits however prompts are cut."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.attention.limits import Ask
from farspan.kernels.attention.reference import attend_reference
from farspan.kernels.paged_prefill.contract import Prompts
from farspan.kernels.paged_prefill.dispatch import choose_prompts_backend
from farspan.kernels.paged_prefill.native import load_native
from farspan.kernels.paged_prefill.reference import attend_prompts_reference
from farspan.kernels.paged_prefill.shares import cut_shares


def _why_not() -> str:
    try:
        load_native()
    except ImportError as problem:
        return str(problem)
    return ""


WHY_NOT = _why_not()
needs_tiles = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are tiles")


@dataclass(frozen=True)
class Case:
    segments: tuple[tuple[int, int, int], ...]
    """(past, length, low) each."""
    heads: int = 4
    groups: int = 2
    qk_dim: int = 64
    v_dim: int = 64
    slots: int = 16
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


LENGTHS = ((0, 1, 0), (0, 2, 0), (0, 31, 0), (0, 129, 0), (7, 5, 0), (100, 33, 0), (250, 50, 0))
CASES = (
    Case(LENGTHS),
    Case(((0, 300, 0), (128, 128, 0)), heads=3, groups=1, slots=5),
    Case(LENGTHS, heads=3, groups=3, qk_dim=80, v_dim=80, slots=1),
    Case(LENGTHS, heads=8, groups=2, qk_dim=96, v_dim=96, slots=256),
    Case(((0, 70, 0), (300, 64, 0)), heads=8, groups=1, qk_dim=128, v_dim=128),
    Case(((0, 40, 0), (290, 21, 0)), qk_dim=192, v_dim=128, softcap=5.0),
    Case(((0, 40, 0), (190, 21, 0)), qk_dim=256, v_dim=36, slots=5),
    Case(((0, 300, 0), (500, 20, 0)), window=1),
    Case(((0, 300, 0), (500, 20, 0), (126, 9, 0)), window=130, slots=5),
    Case(((0, 20, 0), (300, 60, 256), (295, 30, 290)), softcap=3.0),
    Case(((150, 20, 100),), window=60, scale=-0.1),
)


def make(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Prompts, dict]:
    """Inputs in bf16 with NaN wherever nobody looks, q with heads apart."""
    g = torch.Generator().manual_seed(seed)
    past, length, low = (torch.tensor(column, dtype=torch.int32) for column in zip(*case.segments, strict=True))
    widest = int((-(-(past + length) // case.slots)).max())
    shape = (len(case.segments) * widest + 1, case.slots, case.groups)
    keys, values = (torch.full((*shape, dim), float("nan")) for dim in (case.qk_dim, case.v_dim))
    tables_BN = (1 + torch.randperm(shape[0] - 1, generator=g).view(-1, widest)).int()
    for table_N, (before, count, first) in zip(tables_BN, case.segments, strict=True):
        first = first if case.window is None else max(first, before + 1 - case.window)
        seen = torch.arange(first, before + count)
        for pool in (keys, values):
            page = table_N[seen // case.slots].long()
            pool[page, seen % case.slots] = torch.randn(len(seen), *pool.shape[2:], generator=g)
        table_N[: first // case.slots] = -(2**30)
        table_N[-(-(before + count) // case.slots) :] = 2**30
    q_HTD = torch.randn(case.heads, int(length.sum()), case.qk_dim, generator=g)
    starts = torch.cumsum(length, 0, dtype=torch.int32) - length
    prompts = Prompts(starts, length, past, low, tables_BN)
    scale = case.qk_dim**-0.5 if case.scale is None else case.scale
    rule = {"scale": scale, "window": case.window, "softcap": case.softcap}
    return q_HTD.bfloat16().transpose(0, 1), keys.bfloat16(), values.bfloat16(), prompts, rule


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@needs_tiles
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_equal_the_reference_as_far_as_bf16_can_and_never_read_hidden_slots(case, num_threads, threads) -> None:
    threads(num_threads)
    q, keys, values, prompts, rule = make(case)
    want, want_lse = attend_prompts_reference(q.double(), keys.double(), values.double(), prompts, **rule)
    got, lse = load_native()(q, keys, values, prompts, **rule)
    assert error_of(got, want) <= 1.5 * error_of(want.bfloat16(), want)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-4, rtol=0)


@needs_tiles
def test_queries_that_share_a_prefix_see_all_of_it_and_nothing_else() -> None:
    case = Case(((290, 70, 0), (0, 3, 0), (16, 40, 0)))
    q, keys, values, prompts, rule = make(case)
    whole = {**rule, "causal": False}
    want, want_lse = attend_prompts_reference(q.double(), keys.double(), values.double(), prompts, **whole)
    got, lse = load_native()(q, keys, values, prompts, **whole)
    assert error_of(got, want) <= 1.5 * error_of(want.bfloat16(), want)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-4, rtol=0)
    assert not got[70:73].any()


@needs_tiles
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_tiles_are_about_as_exact_as_torchs_own_bf16_attention(spread) -> None:
    q, keys, values, prompts, rule = make(Case(((0, 384, 0),), heads=4, groups=4))
    q = q * spread
    k, v = (pool[prompts.tables_BN[0].long()].flatten(0, 1).transpose(0, 1) for pool in (keys, values))
    torchs = scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], is_causal=True)[0].transpose(0, 1)
    want, _ = attend_prompts_reference(q.double(), keys.double(), values.double(), prompts, **rule)
    got, _ = load_native()(q, keys, values, prompts, **rule)
    assert error_of(got, want) < 1.5 * error_of(torchs, want)


@needs_tiles
@pytest.mark.parametrize("size", [1, 7, 16, 64])
@pytest.mark.parametrize("window", [None, 100])
def test_a_token_has_the_same_bits_however_its_prompt_is_cut_and_whoever_is_beside_it(size, window, threads) -> None:
    case = Case(((0, 300, 0), (0, 50, 0)), heads=6, groups=2, window=window)
    q, keys, values, prompts, rule = make(case)
    whole = load_native()(q, keys, values, prompts, **rule)
    begins = list(range(0, 300, size))
    pieces = [(begin, begin, min(size, 300 - begin)) for begin in begins]
    column = [torch.tensor(x, dtype=torch.int32) for x in zip(*pieces, strict=True)]
    starts, pasts, lengths = column
    cut = Prompts(starts, lengths, pasts, torch.zeros_like(pasts), prompts.tables_BN[:1].expand(len(pieces), -1))
    threads(3)
    out, lse = load_native()(q[:300], keys, values, replace(cut, tables_BN=cut.tables_BN.contiguous()), **rule)
    assert torch.equal(out, whole[0][:300])
    assert torch.equal(lse, whole[1][:300])


@needs_tiles
def test_prompts_with_one_beginning_have_the_bits_they_have_alone() -> None:
    q, keys, values, prompts, rule = make(Case(((640, 20, 0),) * 5, heads=3, groups=1))
    common = 512 // 16
    prompts.tables_BN[:, :common] = prompts.tables_BN[0, :common]
    shares = cut_shares(
        *(x.numpy() for x in (prompts.lengths_B, prompts.pasts_B, prompts.lows_B, prompts.tables_BN)),
        heads=3, groups=1, slots=16, window=None, threads=1,
    )  # fmt: skip
    assert shares.share_common.tolist() == [512]
    together = load_native()(q, keys, values, prompts, **rule)
    for segment in range(5):
        own = slice(20 * segment, 20 * segment + 20)
        zero = torch.zeros(1, dtype=torch.int32)
        numbers = (x[segment : segment + 1] for x in (prompts.lengths_B, prompts.pasts_B, prompts.lows_B))
        alone = load_native()(
            q[own], keys, values, Prompts(zero, *numbers, prompts.tables_BN[segment : segment + 1]), **rule
        )
        assert torch.equal(together[0][own], alone[0])
        assert torch.equal(together[1][own], alone[1])


@needs_tiles
@pytest.mark.parametrize("factor", [1e-3, 40.0, 1e4])
def test_scores_near_and_far_apart_neither_overflow_nor_vanish(factor) -> None:
    q, keys, values, prompts, rule = make(Case(((0, 200, 0), (200, 100, 0))))
    q = q * factor
    want, want_lse = attend_prompts_reference(q.double(), keys.double(), values.double(), prompts, **rule)
    got, lse = load_native()(q, keys, values, prompts, **rule)
    assert error_of(got, want) < 1e-2
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-4, rtol=1e-5)


def test_the_reference_is_the_attention_of_each_segment_over_its_gathered_pages() -> None:
    q, keys, values, prompts, rule = make(Case(((0, 9, 0), (21, 4, 0)), slots=5))
    got, lse = attend_prompts_reference(q, keys, values, prompts, **rule)
    for start, past, length, table_N in ((0, 0, 9, prompts.tables_BN[0]), (9, 21, 4, prompts.tables_BN[1])):
        pages = table_N[: -(-(past + length) // 5)].long()
        k, v = (pool[pages].flatten(0, 1)[: past + length] for pool in (keys, values))
        here = slice(start, start + length)
        want = attend_reference(q[here], k, v, scale=rule["scale"], offset=past)
        assert torch.equal(got[here], want[0])
        assert torch.equal(lse[here], want[1])


@pytest.mark.parametrize("heads", [1, 3, 5, 40, 500])
@pytest.mark.parametrize("threads", [1, 64])
def test_shares_hold_every_query_once(heads, threads) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 900, 12).astype(np.int32)
    pasts = generator.integers(0, 900, 12).astype(np.int32)
    tables = np.repeat(np.arange(200, dtype=np.int32)[None], 12, 0)
    tables[:, 20:] += generator.integers(0, 2, (12, 1)).astype(np.int32)
    shares = cut_shares(
        lengths, pasts, np.zeros(12, np.int32), tables, heads=heads, groups=2, slots=16, window=None, threads=threads
    )
    held = sorted(zip(shares.piece_segment, shares.piece_begin, shares.piece_count, strict=True))
    for segment, length in enumerate(lengths):
        mine = [(begin, count) for number, begin, count in held if number == segment]
        assert [begin for begin, _ in mine] == np.cumsum([0, *(count for _, count in mine[:-1])]).tolist()
        assert sum(count for _, count in mine) == length
    assert shares.share_pieces[-1] == len(held)
    for share, common in enumerate(shares.share_common):
        of = shares.piece_segment[shares.share_pieces[share] : shares.share_pieces[share + 1]]
        assert all((tables[of, : common // 16] == tables[of[0], : common // 16]).all(1))
        assert (pasts[of] >= common).all()


def test_what_is_not_compiled_is_left_to_others() -> None:
    assert choose_prompts_backend(Ask("cpu", torch.float32, 64, 64)) is None
    assert choose_prompts_backend(Ask("cuda", torch.bfloat16, 64, 64)) is None
    assert choose_prompts_backend(Ask("cpu", torch.bfloat16, 576, 512)) is None
    assert (choose_prompts_backend(Ask("cpu", torch.bfloat16, 64, 64)) is None) == bool(WHY_NOT)
