"""Pools of pages for tests: random tables, and NaN wherever no query of any row may look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.paged_decode.reference import seen


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 4
    groups: int = 2
    qk_dim: int = 16
    v_dim: int = 16
    queries: int = 1
    slots: int = 16
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    weighted: bool = False


# Between them every branch: head dims, groups, ends inside and at pages and tiles, rows without a token.
CASES = [
    Case((1,)),
    Case((37,), heads=1, groups=1),
    Case((64, 1, 130, 16), heads=6, groups=2),
    Case((0, 33, 0, 96, 0), heads=4, groups=4),
    Case((100, 7), heads=8, groups=1, qk_dim=24, v_dim=40, slots=8),
    Case((90, 31, 5), window=9),
    Case((90, 31, 5), window=32, queries=3, slots=4),
    Case((40, 3, 1), queries=5, heads=2, groups=1, slots=8),
    Case((70, 40), softcap=2.0, weighted=True),
    Case((50, 0, 90), heads=4, groups=2, weighted=True, queries=2, window=40),
    Case((50, 13), queries=10, heads=4, groups=2, causal=False),
    Case((129,), heads=2, groups=1, qk_dim=128, v_dim=64, slots=16),
    Case((0, 0), weighted=True),
]


def make(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """((q, keys, values, tables, lengths), rule). Pages lie as in the pool: keys and values of all layers of a page."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots, layers, layer = len(case.lengths), case.slots, 3, 1
    width = max(-(-max(case.lengths) // slots), 1) + 1
    num_pages = rows * width + 2
    element = case.groups * (case.qk_dim + case.v_dim)
    storage = torch.full((num_pages, layers * slots * element), float("nan"), dtype=torch.float64)
    order = torch.randperm(num_pages, generator=generator)[: rows * width].view(rows, width)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    tables = order.to(torch.int32)
    # Entries past the end of a row are no pages at all.
    tables[torch.arange(width)[None, :] * slots >= lengths[:, None]] = 2**30
    storage = storage.to(dtype).to(device)
    keys, values = _views(storage, case, layers, layer)
    log_weights = torch.full((num_pages, slots, case.groups), float("nan"), dtype=torch.float32, device=device)
    anyone = seen(lengths, case.queries, width * slots, case.causal, case.window).any(1)
    for row, token in anyone.nonzero().tolist():
        page, slot = int(order[row, token // slots]), token % slots
        for pages, dim in ((keys, case.qk_dim), (values, case.v_dim)):
            pages[page, slot] = torch.randn(case.groups, dim, generator=generator, dtype=torch.float64).to(dtype)
        log_weights[page, slot] = torch.randn(case.groups, generator=generator).relu()
        if token % 7 == 3:
            log_weights[page, slot] = float("-inf")
    shape = (rows, case.queries, case.heads, case.qk_dim)
    q = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    rule: dict[str, Any] = {"scale": 0.3, "causal": case.causal, "window": case.window, "softcap": case.softcap}
    rule["log_weights_PSG"] = log_weights if case.weighted else None
    return (q, keys, values, tables.to(device), lengths.to(device)), rule


def _views(storage: Tensor, case: Case, layers: int, layer: int) -> tuple[Tensor, Tensor]:
    layer_elements = case.slots * case.groups * (case.qk_dim + case.v_dim)
    start = layer * layer_elements

    def view(dim: int, offset: int) -> Tensor:
        strides = (layers * layer_elements, case.groups * dim, dim, 1)
        return storage.as_strided((len(storage), case.slots, case.groups, dim), strides, offset)

    return view(case.qk_dim, start), view(case.v_dim, start + case.slots * case.groups * case.qk_dim)


def assert_close(tolerance: float, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Same types and shapes, the same queries without a key, no NaN, and equal within the tolerance."""
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.isneginf(), b.isneginf())
        assert not b.isnan().any()
        a, b = (x.masked_fill(x.isneginf(), 0.0).double() for x in (a, b))
        assert float((a - b).norm() / b.norm().clamp_min(1.0)) < tolerance
