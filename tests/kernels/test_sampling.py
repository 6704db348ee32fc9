"""Tokens chosen by the compiled kernel are those of plain torch, in every row."""

import shutil

import pytest
import torch
from tests.support.sampling import draws_of, logits_of, points_of

from farspan.kernels.sampling import dispatch
from farspan.kernels.sampling.bench import MULTINOMIAL, OURS, REFERENCE, Case, bench_sampling
from farspan.kernels.sampling.contract import DTYPES, SURE, Draws, Sampling
from farspan.kernels.sampling.native import load_native
from farspan.kernels.sampling.reference import sample_reference
from farspan.kernels.sampling.trial import agrees

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab_size"), [(2310, 97), (770, 1000), (80, 9001), (3, 1), (462, 5)])
def test_the_compiled_choice_of_thousands_of_rows_equals_the_reference(rows, vocab_size, dtype) -> None:
    logits, draws, points = logits_of(rows, vocab_size, dtype), draws_of(rows, cuts=True), points_of(rows)
    told = points < 0.5
    got, want = (sample(logits, draws, points, told) for sample in (load_native().sample, sample_reference))
    sure = got.margin_N >= SURE
    assert torch.equal(got.tokens_N[sure], want.tokens_N[sure])
    assert torch.equal(got.best_N, want.best_N.double())
    torch.testing.assert_close(got.lse_N[told], want.lse_N[told], rtol=0, atol=1e-12)
    # Next to nothing is left to torch, but where all tokens are equal: then top-p may be a number of them.
    sure[3::6] = True
    assert int((~sure).sum()) <= 0.002 * rows
    assert vocab_size < 50 or len(got.tokens_N.unique()) > 40


def test_a_large_vocabulary_is_chosen_from_alike_on_one_thread_and_on_three(threads) -> None:
    logits, draws, points = logits_of(12, 200_003, torch.float32), draws_of(12, cuts=True), points_of(12)
    # Temperatures of the first twelve rows would be two.
    draws.temperature_N.copy_(torch.tensor([0.0, 0.7, 1.0, 2.0] * 3))
    want, found = sample_reference(logits, draws, points), []
    for count in (1, 3):
        threads(count)
        found.append(load_native().sample(logits, draws, points))
    assert torch.equal(found[0].tokens_N, want.tokens_N)
    for one, three in zip(*[(x.tokens_N, x.best_N, x.margin_N) for x in found], strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_without_numbers_says_so_and_leaves_the_others_alone(temperature, broken) -> None:
    logits = logits_of(6, 5000, torch.float32)
    draws, points = draws_of(6, cuts=True), points_of(6)
    draws.temperature_N.fill_(temperature)
    good = load_native().sample(logits, draws, points)
    logits[2] = broken
    logits[4, 4999] = float("nan")
    got, want = (sample(logits, draws, points) for sample in (load_native().sample, sample_reference))
    assert torch.equal(got.best_N, want.best_N.double()) or torch.equal(got.best_N.isnan(), want.best_N.isnan())
    assert not got.best_N[[2, 4]].isfinite().any()
    others = [0, 1, 3, 5]
    assert torch.equal(got.tokens_N[others], good.tokens_N[others])
    assert bool(((got.tokens_N >= 0) & (got.tokens_N < 5000)).all())


def test_a_point_where_the_next_token_begins_is_known_to_be_unsure() -> None:
    logits = torch.zeros(5, 4)
    draws = Draws(*(torch.full((5,), x, dtype=torch.float64) for x in (1.0, 0.0, 1.0, -torch.inf)))
    draws.top_k_N.zero_()
    draws = Draws(draws.temperature_N, draws.top_k_N.long(), draws.top_p_N, draws.least_N)
    points = torch.tensor([0.5, 0.5 + 1e-11, 0.5 - 1e-11, 0.51, 1 - 2.0**-53], dtype=torch.float64)
    chosen = load_native().sample(logits, draws, points)
    assert (chosen.margin_N < SURE).tolist() == [True, True, True, False, True]
    assert chosen.tokens_N.tolist()[1:] == [2, 1, 2, 3]
    # Half of four equal tokens: the order of summation says whether the second still belongs to it.
    draws.top_p_N.fill_(0.5)
    assert (load_native().sample(logits, draws, torch.full((5,), 0.3).double()).margin_N < SURE).all()


def test_rows_that_lie_apart_and_backwards_are_chosen_from_as_if_they_lay_together() -> None:
    logits, draws, points = logits_of(40, 700, torch.bfloat16), draws_of(40, cuts=True), points_of(40)
    spread = torch.full((80, 900), float("nan")).bfloat16()
    spread[::2, :700] = logits
    want = load_native().sample(logits, draws, points)
    assert torch.equal(load_native().sample(spread[::2, :700], draws, points).tokens_N, want.tokens_N)
    assert torch.equal(load_native().sample(logits.t().contiguous().t(), draws, points).tokens_N, want.tokens_N)
    none = load_native().sample(logits[:0], draws_of(0, cuts=True), points[:0])
    assert none.tokens_N.shape == (0,)


def test_a_kernel_that_chooses_another_token_than_the_reference_is_not_used(monkeypatch) -> None:
    def off_by_one(logits_NV, draws, points_N, told_N=None):
        chosen = load_native().sample(logits_NV, draws, points_N, told_N)
        chosen.tokens_N[3] += 1
        return chosen

    cpu = torch.device("cpu")
    assert agrees(load_native(), cpu, torch.bfloat16)
    assert not agrees(Sampling(off_by_one, cuts=True), cpu, torch.bfloat16)
    dispatch._on_cpu.cache_clear()
    monkeypatch.setattr(dispatch, "load_native", lambda: Sampling(off_by_one, cuts=True))
    try:
        assert dispatch._on_cpu(torch.float32) is None
    finally:
        dispatch._on_cpu.cache_clear()


@pytest.mark.parametrize(
    ("capability", "right", "faster", "used"),
    [
        ((9, 0), True, True, True),
        ((9, 0), True, False, False),
        ((9, 0), False, True, False),
        ((7, 5), True, True, False),
    ],
)
def test_triton_is_used_on_gpus_that_it_is_written_for_where_it_is_right_and_faster(
    capability, right, faster, used, monkeypatch
) -> None:
    pytest.importorskip("triton", reason="Triton is installed on Linux only")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "agrees", lambda *asked: right)
    monkeypatch.setattr(dispatch, "is_faster", lambda *asked: faster)
    found = dispatch._on_cuda(torch.bfloat16, 32_000)
    assert (found is not None) == used
    assert found is None or not found.cuts


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's bench is of Triton")
def test_the_bench_sets_the_kernel_beside_torch_and_gives_a_wrong_one_no_time(monkeypatch) -> None:
    cases = [Case(3, 300, torch.float32), Case(2, 300, torch.bfloat16, top_p=0.9), Case(1, 40, torch.float32, 0.0)]
    rows = bench_sampling(cases)
    assert [(row["asks"], row["contestant"]) for row in rows] == [
        *(("drawn", name) for name in (REFERENCE, OURS, MULTINOMIAL)),
        *((asks, name) for asks in ("top-p 0.9", "greedy") for name in (REFERENCE, OURS)),
    ]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)

    def first(logits_NV, draws, points_N, told_N=None):
        chosen = load_native().sample(logits_NV, draws, points_N, told_N)
        chosen.tokens_N.zero_()
        return chosen

    monkeypatch.setattr("farspan.kernels.sampling.bench.choose_sampling", lambda *asked: Sampling(first, cuts=True))
    wrong = bench_sampling(cases[:1])
    assert [row["contestant"] for row in wrong if "wrong" in row] == [OURS]
    assert [row["contestant"] for row in wrong if "seconds" in row] == [REFERENCE, MULTINOMIAL]
