"""Attention in Triton against the plain-torch reference: compiled on a GPU, interpreted elsewhere.

The interpreter multiplies no bf16 matrices; fp16 stands for it there.
"""

import os
from itertools import pairwise

import pytest
import torch
from tests.support.flash import flash_backward, flash_forward

from farspan.kernels.attention.flash import Spans, flash_backend
from farspan.kernels.attention.flash_windows import TritonWindows
from farspan.kernels.attention.launch import Tiles, tile_rows
from farspan.kernels.attention.packed import backward_each, forward_each
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward
from farspan.kernels.attention.triton import attend_packed_triton, attend_triton
from farspan.kernels.attention.triton_backward import attend_packed_triton_backward, attend_triton_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float64, HALF] if INTERPRETED else [HALF]
DEVICE = [pytest.param("cpu")] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
# Small and unequal, so that short sequences cross tiles in both directions.
TILES = Tiles(16, 32)

# T, S, query heads, kv heads, head dim of q and k, head dim of v; offset, window, softcap: odd on purpose.
CASES = [
    ((1, 1, 1, 1, 16, 16), (0, None, None)),
    ((37, 37, 4, 2, 16, 16), (0, None, None)),
    ((50, 50, 4, 1, 32, 32), (0, 7, None)),
    ((37, 50, 4, 1, 24, 40), (13, 9, None)),
    ((20, 70, 2, 2, 16, 16), (None, None, 3.0)),
    ((20, 30, 2, 1, 8, 8), (-9, None, None)),
    ((64, 64, 2, 1, 32, 32), (0, 20, 2.0)),
    ((70, 20, 2, 1, 8, 8), (-3, 9, None)),
    ((33, 100, 4, 2, 16, 48), (67, None, 1.0)),
    ((48, 48, 2, 1, 16, 16), (48, 48, None)),
    ((20, 40, 2, 1, 128, 128), (20, None, None)),
    ((18, 18, 1, 1, 256, 200), (0, None, None)),
    # One row more taken for visible to all would fill a whole tile that is computed without a mask.
    ((100, 100, 1, 1, 16, 16), (0, 46, None)),
    ((48, 62, 1, 1, 16, 16), (14, None, None)),
]


@pytest.fixture(autouse=True)
def _poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(device: str, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def assert_close(dtype: torch.dtype, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    """Same types, shapes and rows without a key; equal within what `dtype` can tell apart."""
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.isneginf(), b.isneginf())
        a, b = (x.masked_fill(x.isneginf(), 0.0).double() for x in (a, b))
        # A softmax over one key has no gradient: zero is compared with zero.
        assert float((a - b).norm() / b.norm().clamp_min(1.0)) < TOLERANCE[dtype]


def both_ways(forward, backward, q, k, v, dout, **rule) -> tuple[torch.Tensor, ...]:
    out, lse = forward(q, k, v, **rule)
    return out, lse, *backward(dout, q, k, v, out, lse, **rule)


# In fp32 everything; in the other types the cases that between them take every branch.
@pytest.mark.parametrize(
    ("shape", "band", "dtype"),
    [(*case, torch.float32) for case in CASES] + [(*case, dtype) for case in CASES[2:7] for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICE)
def test_attention_in_triton_and_its_gradients_equal_the_reference(device, shape, band, dtype) -> None:
    queries, keys, heads, groups, qk_dim, v_dim = shape
    offset, window, softcap = band
    q, k, v, dout = make(
        device, dtype, (queries, heads, qk_dim), (keys, groups, qk_dim), (keys, groups, v_dim), (queries, heads, v_dim)
    )
    rule = {"scale": 0.3, "offset": offset, "window": window, "softcap": softcap}
    tiles = {"tiles": TILES} if INTERPRETED else {}
    got = both_ways(attend_triton, attend_triton_backward, q, k, v, dout, **rule, **tiles)
    assert_close(dtype, got, both_ways(attend_reference, attend_reference_backward, q, k, v, dout, **rule))


@pytest.mark.parametrize("tiles", [Tiles(16, 32), Tiles(64, 16)], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (9, 2.0)])
@pytest.mark.parametrize("device", DEVICE)
def test_one_launch_over_packed_documents_equals_each_document_alone(device, window, softcap, tiles) -> None:
    bounds = (0, 1, 18, 18, 52, 101)
    q, k, v, dout = make(device, torch.float32, (101, 4, 16), (101, 2, 16), (101, 2, 24), (101, 4, 24))
    rule = {"bounds": bounds, "scale": 0.3, "window": window, "softcap": softcap}
    got = both_ways(attend_packed_triton, attend_packed_triton_backward, q, k, v, dout, **rule, tiles=tiles)
    alone = forward_each(attend_reference), backward_each(attend_reference_backward)
    assert_close(torch.float32, got, both_ways(*alone, q, k, v, dout, **rule))


@pytest.mark.parametrize("device", DEVICE)
def test_a_changed_document_changes_no_bit_of_another(device) -> None:
    bounds = (0, 30, 64, 90)
    q, k, v, dout = make(device, torch.float32, (90, 2, 16), (90, 1, 16), (90, 1, 16), (90, 2, 16))
    rule = {"bounds": bounds, "scale": 0.3, "tiles": Tiles(16, 16)}
    before = both_ways(attend_packed_triton, attend_packed_triton_backward, q, k, v, dout, **rule)
    for x in (q, k, v, dout):
        x[30:64] += 1.0
    after = both_ways(attend_packed_triton, attend_packed_triton_backward, q, k, v, dout, **rule)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:30], b[:30])
        assert torch.equal(a[64:], b[64:])
        assert not torch.equal(a[30:64], b[30:64])


@pytest.mark.parametrize("device", DEVICE)
def test_tensors_with_strange_strides_give_the_bits_of_their_contiguous_copies(device) -> None:
    q, k, v, dout = make(device, torch.float32, (30, 4, 16), (30, 2, 16), (30, 2, 16), (30, 4, 16))
    rule = {"scale": 0.3, "offset": 0, "window": 9, "tiles": TILES}
    want = both_ways(attend_triton, attend_triton_backward, q, k, v, dout, **rule)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    for a, b in zip(both_ways(attend_triton, attend_triton_backward, *strange, **rule), want, strict=True):
        assert torch.equal(a, b)
    # Heads before tokens, as models hand them over.
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout)]
    for a, b in zip(both_ways(attend_triton, attend_triton_backward, *strange, **rule), want, strict=True):
        assert torch.equal(a, b)


class WrittenOut:
    """A flash library's kernel, which writes down the spans its forward was asked for."""

    def __init__(self) -> None:
        self.asked: list[Spans] = []

    def forward(self, q, k, v, spans, sight):
        self.asked.append(spans)
        ends = spans.queries_N, spans.keys_N
        return flash_forward(q, k, v, *ends, sight.scale, sight.left, sight.right, sight.softcap)

    def backward(self, dout, q, k, v, out, lse, spans, sight):
        ends = spans.queries_N, spans.keys_N
        return flash_backward(dout, q, k, v, out, lse, *ends, sight.scale, sight.left, sight.right, sight.softcap)


# T, S, offset, window: a band whose right end is behind the last key, one cut at both ends, one out of reach.
@pytest.mark.parametrize("band", [(40, 40, 0, 7), (20, 50, 30, 9), (20, 50, 13, 30), (50, 40, -4, 9), (16, 30, 40, 30)])
@pytest.mark.parametrize("device", DEVICE)
def test_windows_of_triton_before_a_flash_backward_equal_the_reference(device, band) -> None:
    queries, keys, offset, window = band
    q, k, v, dout = make(device, torch.float32, *((rows, heads, 128) for rows, heads in _rows(queries, keys)))
    rest = WrittenOut()
    backend = flash_backend("windows", TritonWindows(rest, least_tokens=1))
    rule = {"scale": 0.1, "offset": offset, "window": window}
    got = both_ways(backend.forward, backend.backward, q, k, v, dout, **rule)
    assert_close(torch.float32, got, both_ways(attend_reference, attend_reference_backward, q, k, v, dout, **rule))
    assert not rest.asked


@pytest.mark.parametrize("device", DEVICE)
def test_packed_windows_of_triton_before_a_flash_backward_equal_each_document_alone(device) -> None:
    q, k, v, dout = make(device, torch.float32, *((rows, heads, 128) for rows, heads in _rows(60, 60)))
    rest = WrittenOut()
    backend = flash_backend("windows", TritonWindows(rest, least_tokens=20))
    rule = {"bounds": (0, 1, 18, 18, 52, 60), "scale": 0.1, "window": 9}
    got = both_ways(backend.packed_forward, backend.packed_backward, q, k, v, dout, **rule)
    alone = forward_each(attend_reference), backward_each(attend_reference_backward)
    assert_close(torch.float32, got, both_ways(*alone, q, k, v, dout, **rule))
    assert not rest.asked


@pytest.mark.parametrize("device", DEVICE)
def test_what_is_no_window_over_a_long_document_of_heads_of_128_is_left_to_flash(device) -> None:
    rest = WrittenOut()
    backend = flash_backend("windows", TritonWindows(rest, least_tokens=20))
    for tokens, dim, window in ((40, 128, None), (19, 128, 5), (40, 64, 5)):
        q, k, v, _ = make(device, torch.float32, *((rows, heads, dim) for rows, heads in _rows(tokens, tokens)))
        backend.packed_forward(q, k, v, bounds=(0, tokens), scale=0.1, window=window)
    assert len(rest.asked) == 3


def _rows(queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(tokens, heads) of q, k, v and the gradient of out."""
    return (queries, 4), (keys, 2), (keys, 2), (queries, 4)


def test_tiles_of_packed_documents_hold_every_row_once_and_cross_no_bound() -> None:
    bounds = (0, 5, 5, 37, 40)
    rows = tile_rows(bounds, 16)
    starts = [(row, min(row + 16, stop)) for row, stop, _, _ in rows]
    assert [t for start, stop in starts for t in range(start, stop)] == list(range(40))
    for row, stop, other, other_stop in rows:
        assert (other, other_stop) in list(pairwise(bounds))
        assert other <= row < stop == other_stop
