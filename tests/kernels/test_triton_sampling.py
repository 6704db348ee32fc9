"""Tokens chosen by Triton are those of plain torch: compiled on a GPU, interpreted elsewhere."""

import os

import pytest
import torch
from tests.support.sampling import draws_of, logits_of, points_of

from farspan.kernels.sampling.contract import DTYPES, SURE
from farspan.kernels.sampling.reference import sample_reference
from farspan.kernels.sampling.trial import is_faster
from farspan.kernels.sampling.triton import load_triton, sample_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter takes milliseconds for each program.
ROWS = 36 if INTERPRETED else 3300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab_size", "tile"), [(97, 128), (500, 128), (5, 16)])
@pytest.mark.parametrize("device", DEVICE)
def test_the_choice_of_triton_equals_the_reference_in_every_row(device, vocab_size, tile, dtype) -> None:
    logits, draws = logits_of(ROWS, vocab_size, dtype).to(device), draws_of(ROWS, cuts=False, device=device)
    points = points_of(ROWS).to(device)
    told = points < 0.5
    got, want = sample_triton(logits, draws, points, told, tile), sample_reference(logits, draws, points, told)
    sure = (got.margin_N >= SURE).cpu()
    assert torch.equal(got.tokens_N.cpu()[sure], want.tokens_N.cpu()[sure])
    assert torch.equal(got.best_N, want.best_N.double())
    torch.testing.assert_close(got.lse_N[told], want.lse_N[told], rtol=0, atol=1e-12)
    assert int((~sure).sum()) <= 0.002 * ROWS
    assert vocab_size < 50 or len(got.tokens_N.unique()) > 15


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("device", DEVICE)
def test_a_row_without_numbers_says_so_and_leaves_the_others_alone(device, broken) -> None:
    logits, draws, points = logits_of(12, 300, torch.float32), draws_of(12, cuts=False), points_of(12)
    logits, points, draws = logits.to(device), points.to(device), draws_of(12, cuts=False, device=device)
    good = sample_triton(logits, draws, points, tile=128)
    logits[[2, 8]] = broken
    logits[[4, 10], 299] = float("nan")
    got = sample_triton(logits, draws, points, tile=128)
    others = [0, 1, 3, 5, 6, 7, 9, 11]
    assert not got.best_N[[2, 4, 8, 10]].isfinite().any()
    assert got.best_N[[4, 10]].isnan().all()
    assert torch.equal(got.tokens_N[others], good.tokens_N[others])
    assert bool(((got.tokens_N >= 0) & (got.tokens_N < 300)).all())


@pytest.mark.parametrize("device", DEVICE)
def test_rows_that_lie_apart_and_none_at_all_are_chosen_from_too(device) -> None:
    logits, points = logits_of(9, 200, torch.float32).to(device), points_of(9).to(device)
    draws = draws_of(9, cuts=False, device=device)
    want = sample_triton(logits, draws, points, tile=128).tokens_N
    spread = torch.full((9, 333), float("nan"), device=device)
    spread[:, :200] = logits
    assert torch.equal(sample_triton(spread[:, :200], draws, points, tile=128).tokens_N, want)
    assert torch.equal(sample_triton(logits.t().contiguous().t(), draws, points, tile=128).tokens_N, want)
    none = sample_triton(logits[:0], draws_of(0, cuts=False, device=device), points[:0])
    assert none.tokens_N.shape == (0,)


@pytest.mark.skipif(not INTERPRETED, reason="how fast a GPU is, is its own affair")
def test_a_kernel_that_takes_longer_than_torch_is_known_to() -> None:
    assert not is_faster(load_triton(), torch.device("cpu"), torch.float32, 300)
