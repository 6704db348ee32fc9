"""Normalization by the compiled kernel equals the reference, which equals transformers' modules."""

import shutil

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from farspan.kernels.rms_norm.contract import Kind
from farspan.kernels.rms_norm.native import load_native
from farspan.kernels.rms_norm.reference import bind_rms_norm_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
# A few roundings apart where a sum differs in its last bits.
ULP = {torch.float32: 2**-20, torch.bfloat16: 2**-7}


def draw(rows, size, dtype):
    generator = torch.Generator().manual_seed(rows * size)
    return [torch.randn(s, generator=generator).to(dtype) for s in ((rows, size), (size,))]


@needs_compiler
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dtype", list(ULP), ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 768), (5, 8), (3, 51), (2, 1), (7, 24), (70, 51), (0, 16)], ids=str)
def test_the_compiled_normalization_equals_the_reference(rows, size, dtype, kind) -> None:
    x, w = draw(rows, size, dtype)
    got, want = load_native()(w, 1e-6, kind)(x), bind_rms_norm_reference(w, 1e-6, kind)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.double(), rtol=ULP[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", list(ULP), ids=str)
@pytest.mark.parametrize(("module", "kind"), [(LlamaRMSNorm, Kind.SCALED), (Gemma2RMSNorm, Kind.ONE_MORE)])
def test_the_reference_equals_the_module_of_transformers_bit_for_bit(module, kind, dtype) -> None:
    x, w = draw(9, 96, dtype)
    norm = module(96).to(dtype)
    norm.weight.data.copy_(w)
    assert torch.equal(bind_rms_norm_reference(w, 1e-6, kind)(x), norm(x))


@needs_compiler
@pytest.mark.parametrize("dtype", list(ULP), ids=str)
def test_rows_that_lie_apart_and_numbers_that_are_none_stay_by_themselves(dtype) -> None:
    x, w = draw(4, 40, dtype)
    spread = torch.full((8, 64), float("nan")).to(dtype)
    spread[::2, :40] = x
    norm = load_native()(w, 1e-6, Kind.SCALED)
    assert torch.equal(norm(spread[::2, :40]), norm(x))
    x[1, 7] = float("nan")
    got = norm(x)
    assert got[1].isnan().all()
    assert got[[0, 2, 3]].isfinite().all()
