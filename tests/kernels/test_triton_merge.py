"""The merge in Triton against the plain-torch reference: compiled on a GPU, interpreted elsewhere."""

import os

import pytest
import torch

from farspan.kernels.merge.reference import merge_partials_reference
from farspan.kernels.merge.triton import merge_partials_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    a_lse, b_lse = (9 * torch.randn(shape[:2], generator=generator, dtype=torch.float64) for _ in range(2))
    return [a, a_lse.to(device, wide), b, b_lse.to(device, wide)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 40), (7, 2, 256)], ids=str)
@pytest.mark.parametrize("device", DEVICE)
def test_merging_two_key_ranges_in_triton_equals_the_reference(device, shape, dtype) -> None:
    a, a_lse, b, b_lse = make(device, dtype, shape)
    out, lse = merge_partials_triton(a, a_lse, b, b_lse)
    want, want_lse = merge_partials_reference(a, a_lse, b, b_lse)
    assert (out.dtype, lse.dtype) == (want.dtype, want_lse.dtype)
    assert float((out.double() - want.double()).abs().max()) < 4 * TOLERANCE[dtype]
    assert float((lse - want_lse).abs().max()) < 1e-5


@pytest.mark.parametrize("device", DEVICE)
def test_a_query_that_saw_no_key_merges_to_the_other_range_and_never_to_nan(device) -> None:
    a, a_lse, b, b_lse = make(device, torch.float32, (3, 2, 8))
    nothing = torch.full_like(a_lse, float("-inf"))
    out, lse = merge_partials_triton(torch.zeros_like(a), nothing, b, b_lse)
    assert torch.equal(out, b)
    assert torch.equal(lse, b_lse)
    out, lse = merge_partials_triton(torch.zeros_like(a), nothing, torch.zeros_like(b), nothing)
    assert not out.any()
    assert bool(lse.isneginf().all())


@pytest.mark.parametrize("device", DEVICE)
def test_partials_that_arrive_heads_first_merge_to_the_same_bits(device) -> None:
    parts = make(device, torch.float32, (6, 4, 16))
    want = merge_partials_triton(*parts)
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
    for a, b in zip(merge_partials_triton(*strange), want, strict=True):
        assert torch.equal(a, b)
