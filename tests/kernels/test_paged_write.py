"""Writing keys and values of new tokens into pages on a CPU equals torch's indexing."""

import shutil

import pytest
import torch

from farspan.kernels.paged_decode import write
from farspan.kernels.paged_decode.write import write_pages

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
PAGES, SLOTS, GROUPS, DIM, VALUE_DIM = 9, 5, 3, 16, 8


def draw(*size, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def given(dtype, tokens=17):
    """Pages of a pool of several layers, queries beside keys, and a table of several groups."""
    pool = draw(PAGES, 2, SLOTS, GROUPS * (DIM + VALUE_DIM), dtype=dtype)
    keys = pool[:, 1, :, : GROUPS * DIM].unflatten(2, (GROUPS, DIM))
    values = pool[:, 1, :, GROUPS * DIM :].unflatten(2, (GROUPS, VALUE_DIM))
    made = draw(tokens, GROUPS * (DIM + VALUE_DIM) + 4, dtype=dtype)
    k = made[:, 4 : 4 + GROUPS * DIM].unflatten(1, (GROUPS, DIM))
    v = made[:, 4 + GROUPS * DIM :].unflatten(1, (GROUPS, VALUE_DIM))
    places = torch.randperm(PAGES * SLOTS, generator=torch.Generator().manual_seed(1))[:tokens]
    page_TG = torch.stack([torch.zeros_like(places), places // SLOTS], 1)
    return pool, keys, values, k, v, page_TG[:, 1], places % SLOTS


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_copies_equal_indexing_and_touch_nothing_else(dtype, monkeypatch) -> None:
    (pool, *ours), (want, *torchs) = given(dtype), given(dtype)
    write_pages(*ours)
    monkeypatch.setattr(write, "_write_compiled", lambda *_: False)
    write_pages(*torchs)
    assert torch.equal(pool, want)
    assert not torch.equal(pool, given(dtype)[0])


@pytest.mark.parametrize("change", ["fp64", "heads apart", "no token"])
def test_what_is_not_compiled_is_written_too(change) -> None:
    _, keys, values, k, v, page, slot = given(torch.float64 if change == "fp64" else torch.bfloat16)
    if change == "heads apart":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    if change == "no token":
        k, v, page, slot = k[:0], v[:0], page[:0], slot[:0]
    write_pages(keys, values, k, v, page, slot)
    assert torch.equal(keys[page, slot], k)
    assert torch.equal(values[page, slot], v)
