"""New tokens written into pages by Triton: the bytes of indexing, and nothing beside them."""

import os

import pytest
import torch

from farspan.kernels.paged_decode.triton_write import write_pages_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("groups", "qk_dim", "v_dim"), [(2, 16, 16), (3, 24, 8), (1, 40, 20), (8, 128, 128)])
@pytest.mark.parametrize("device", DEVICE)
def test_tokens_written_by_triton_equal_those_written_by_indexing(device, groups, qk_dim, v_dim) -> None:
    generator = torch.Generator().manual_seed(groups)
    # Layers lie beside each other in a page, and other tables beside this one's column of pages.
    storage = torch.randn(9, 2 * 4 * groups * (qk_dim + v_dim), generator=generator).to(device)
    split = 4 * groups * qk_dim
    keys, values = (
        part.unflatten(1, (4, groups, -1))
        for part in storage[:, storage.shape[1] // 2 :].split([split, 4 * groups * v_dim], 1)
    )
    # Heads before tokens, as models hand them over.
    k, v = (torch.randn(groups, 6, dim, generator=generator).to(device).transpose(0, 1) for dim in (qk_dim, v_dim))
    page_TG = torch.tensor([[0, 8], [0, 3], [0, 3], [0, 0], [0, 5], [0, 3]], device=device)
    slot_T = torch.tensor([3, 0, 1, 2, 0, 0], device=device)
    # Rows that fill a graph up write what another row writes there.
    k[5], v[5] = k[1], v[1]
    before = storage.clone()
    write_pages_triton(keys, values, k, v, page_TG[:, 1], slot_T)
    got = storage.clone()
    storage.copy_(before)
    keys[page_TG[:, 1], slot_T], values[page_TG[:, 1], slot_T] = k, v
    assert torch.equal(got, storage)
    assert not torch.equal(got, before)


@pytest.mark.parametrize("device", DEVICE)
def test_no_tokens_write_nothing(device) -> None:
    keys = torch.zeros(1, 4, 2, 16, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    write_pages_triton(keys, keys.clone(), keys[0, :0], keys[0, :0], none, none)
    assert not keys.any()
