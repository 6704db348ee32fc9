"""Decode rows of a layer in one call: their keys are written where they belong, and attended with all others."""

import shutil

import pytest
import torch
from tests.support.paged_cases import assert_close

from farspan.kernels.paged_decode.gathered import attend_pages_gathered
from farspan.kernels.paged_decode.native import load_native
from farspan.kernels.paged_decode.reference import attend_pages_reference
from farspan.kernels.paged_decode.tokens import Rows, bind_tokens

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
PAGES, SLOTS, GROUPS, HEADS, D, C = 40, 4, 2, 6, 24, 16


def draw(*size, dtype, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def pool(dtype):
    """Pages of two layers, as a pool lays them out; all slots but those that are read are none."""
    block = torch.full((PAGES, 3 * SLOTS * GROUPS * (D + C)), float("nan"), dtype=dtype)
    apart = block.stride(0)
    keys = block.as_strided((PAGES, SLOTS, GROUPS, D), (apart, GROUPS * D, D, 1), SLOTS * GROUPS * (D + C))
    values = block.as_strided(
        (PAGES, SLOTS, GROUPS, C), (apart, GROUPS * C, C, 1), SLOTS * GROUPS * (D + C) + SLOTS * GROUPS * D
    )
    return block, keys, values


@needs_compiler
@pytest.mark.parametrize("lengths", [(1,), (9,), (17, 4, 1, 30)], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writing_and_attending_in_one_call_equals_doing_one_after_the_other(dtype, window, softcap, lengths) -> None:
    block, keys, values = pool(dtype)
    count, order = len(lengths), torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))
    tables = order[: count * 8].view(count, 8).int()
    for row, length in enumerate(lengths):
        for token in range(length - 1):
            keys[tables[row, token // SLOTS], token % SLOTS] = draw(GROUPS, D, dtype=dtype, seed=token)
            values[tables[row, token // SLOTS], token % SLOTS] = draw(GROUPS, C, dtype=dtype, seed=token)
    last = torch.tensor(lengths) - 1
    # Two groups of pages: those of one group lie apart.
    pages = torch.stack([tables[torch.arange(count), last // SLOTS].long(), torch.zeros(count).long()], 1)
    # As transformers hands heads over: those of a row need not lie side by side.
    q, k, v = (draw(n, count, dim, dtype=dtype).transpose(0, 1) for n, dim in ((HEADS, D), (GROUPS, D), (GROUPS, C)))
    before = block.clone()
    kernel = bind_tokens(load_native(), keys, values, HEADS, scale=0.3, window=window, softcap=softcap)
    assert kernel is not None
    got = kernel(q, k, v, Rows(pages[:, 0], last % SLOTS, tables, torch.tensor(lengths, dtype=torch.int32)))
    written, wrote = block.clone(), block.copy_(before)
    keys[pages[:, 0], last % SLOTS], values[pages[:, 0], last % SLOTS] = k, v
    assert torch.equal(written.nan_to_num(7.0), wrote.nan_to_num(7.0))
    inputs = [x.float() for x in (q.unsqueeze(1), keys, values)]
    want, lse = attend_pages_reference(
        *inputs, tables, torch.tensor(lengths), scale=0.3, window=window, softcap=softcap
    )
    assert_close({torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype], (got, lse), (want.squeeze(1).to(dtype), lse))


def test_only_the_compiled_kernel_is_bound_and_only_to_pages_it_reads() -> None:
    _, keys, values = pool(torch.float64)
    assert (
        bind_tokens(attend_pages_gathered, keys.float(), values.float(), HEADS, scale=1, window=None, softcap=None)
        is None
    )
    assert bind_tokens(attend_pages_gathered, keys, values, HEADS, scale=1, window=None, softcap=None) is None
