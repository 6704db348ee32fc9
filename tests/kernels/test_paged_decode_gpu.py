"""Attention over pages on a real GPU, in real sizes: bf16, long and ragged contexts, captured graphs."""

from typing import Any

import pytest
import torch
from tests.support.paged_cases import Case, assert_close, make
from torch import Tensor

from farspan.kernels.attention.limits import Ask
from farspan.kernels.paged_decode.dispatch import choose_pages_backend
from farspan.kernels.paged_decode.reference import attend_pages_reference
from farspan.kernels.paged_decode.shared import attend_shared_prefix, split_prefix

pytestmark = pytest.mark.gpu
SLOTS = 16


def problem(lengths: list[int], heads: int, groups: int, head_dim: int, queries: int = 1) -> tuple[Tensor, ...]:
    """Pages in random order in a pool of two layers; the slots after the end of a row are NaN."""
    counts = [-(-length // SLOTS) for length in lengths]
    generator = torch.Generator("cuda").manual_seed(0)
    storage = torch.randn(
        max(sum(counts), 1), 2, 2, SLOTS, groups, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16
    )
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    width = max(*counts, 1)
    tables = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    for row, (own, length) in enumerate(zip(order, lengths, strict=True)):
        tables[row, : len(own)] = own
        if length % SLOTS:
            storage[own[-1], :, :, length % SLOTS :] = float("nan")
    q = torch.randn(len(lengths), queries, heads, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return q, storage[:, 1, 0], storage[:, 1, 1], tables.cuda(), lengths_B


def row_by_row(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, **rule: Any):
    """The reference, whose scores of all rows would not fit, over one row after another."""
    parts = []
    for row, length in enumerate(lengths.tolist()):
        here, pages = slice(row, row + 1), max(-(-length // SLOTS), 1)
        parts.append(attend_pages_reference(q[here], keys, values, tables[here, :pages], lengths[here], **rule))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def chosen(inputs: tuple[Tensor, ...]):
    return choose_pages_backend(Ask.of(inputs[1], inputs[2]))


RAGGED = [32768, 0, 1, *(31 * n * n + 17 for n in range(1, 30)), *(1 + 97 * n for n in range(32))]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(32, 8), (8, 8), (16, 1)])
@pytest.mark.parametrize("lengths", [[32768], [32001], RAGGED], ids=["1 row", "1 odd row", "64 ragged rows"])
def test_ragged_bf16_contexts_up_to_32k_equal_the_reference(lengths, heads, groups, head_dim) -> None:
    inputs = problem(lengths, heads, groups, head_dim)
    rule: dict[str, Any] = {"scale": head_dim**-0.5}
    assert_close(2e-2, chosen(inputs)(*inputs, **rule), row_by_row(*inputs, **rule))


@pytest.mark.parametrize(("queries", "window"), [(1, 1024), (4, None), (8, 4096)])
def test_windows_and_several_queries_equal_the_reference_on_long_contexts(queries, window) -> None:
    inputs = problem([20000, 5, 4097, 900], 32, 8, 128, queries)
    rule: dict[str, Any] = {"scale": 0.09, "window": window, "softcap": 30.0}
    assert_close(2e-2, chosen(inputs)(*inputs, **rule), row_by_row(*inputs, **rule))


def test_a_prefix_read_once_for_64_rows_equals_each_row_over_its_whole_context() -> None:
    q, keys, values, tables, lengths = problem([2048 + 16 * n + 3 for n in range(1, 65)], 32, 8, 128)
    tables[:, :128] = tables[0, :128]
    want = row_by_row(q, keys, values, tables, lengths, scale=0.09)
    apart = split_prefix(tables, lengths, 128, SLOTS)
    got = attend_shared_prefix(chosen((q, keys, values)), q, keys, values, *apart, scale=0.09)
    assert_close(2e-2, got, want)


def test_a_captured_graph_is_right_for_lengths_and_tables_it_was_not_captured_with() -> None:
    q, keys, values, tables, lengths = problem([4096, 300, 2000, 17], 32, 8, 128)
    attend = chosen((q, keys, values))
    other_lengths, other_tables = lengths.flip(0).clone(), tables.flip(0).clone()
    attend(q, keys, values, tables, lengths, scale=0.09)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(q, keys, values, tables, lengths, scale=0.09)
    lengths.copy_(other_lengths)
    tables.copy_(other_tables)
    graph.replay()
    assert_close(2e-2, got, row_by_row(q, keys, values, tables, lengths, scale=0.09))


def test_nothing_waits_for_the_device() -> None:
    (q, keys, values, tables, lengths), rule = make(Case((40, 700, 0), qk_dim=64, v_dim=64), "cuda", torch.bfloat16)
    attend = chosen((q, keys, values))
    attend(q, keys, values, tables, lengths, **rule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, keys, values, tables, lengths, **rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
