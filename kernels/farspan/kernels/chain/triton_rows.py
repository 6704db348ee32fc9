"""Normalizations, sums, rotations and gates of bf16 rows in Triton, several steps of a chain in one kernel.

T rows of K numbers, or of H heads of D numbers, R of them rotated. Every value is rounded to the rows' type where the
step that makes it ends, and is fp32 in between. Grids depend on shapes alone. A row is read wherever it lies, its
numbers side by side; rows that are made lie one after another. `early`: as in early.py, where the GPU can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.chain.contract import Activation, Normalize
from farspan.kernels.early import ask_ahead, bytes_ahead, early_on, wait_for_rows
from farspan.kernels.rms_norm.contract import Kind

# A row is normalized by one program, which holds it in registers.
WIDEST_ROW = 32768
_PLAIN = tl.constexpr(0)
_SCALED = tl.constexpr(1)
_GELU_TANH = tl.constexpr(1)
# - sqrt(8 / pi)
_STEEPNESS = tl.constexpr(-1.5957691216057308)
_GATE_TILE, _TURNED_HEADS = 1024, 4
# Products that are rounded and then added would become one operation that rounds once.
OPTIONS = {"enable_fp_fusion": False}
# fp16 is what Triton's interpreter rounds as a GPU does.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def normalize_rows(x_TK: Tensor, norm: Normalize, early: bool = True) -> Tensor:
    """Every head of x, as wide as the weight."""
    y_TK = _rows_like(x_TK)
    _launch_sum(x_TK, None, None, norm, None, y_TK, early)
    return y_TK


def add_rows(
    x_TK: Tensor, a_TK: Tensor, before: Normalize | None, after: Normalize | None, early: bool = True
) -> Sequence[Tensor]:
    """The sum of x, normalized if there is a `before`, and a; and that sum normalized, if there is an `after`."""
    sum_TK = _rows_like(x_TK)
    y_TK = None if after is None else _rows_like(x_TK)
    _launch_sum(x_TK, a_TK, before, after, sum_TK, y_TK, early)
    return (sum_TK,) if y_TK is None else (sum_TK, y_TK)


def turn_rows(
    xs_TK: Sequence[Tensor],
    norms: Sequence[Normalize | None],
    cos_TR: Tensor,
    sin_TR: Tensor,
    dim: int,
    early: bool = True,
) -> list[Tensor]:
    """One or two rows of heads rotated, all normalized before or none."""
    made = [_rows_like(x) for x in xs_TK]
    # Of one alone the other has no heads.
    x, y, norm = xs_TK[-1], made[-1], norms[-1]
    first = norms[0]
    num_heads = [x.shape[1] // dim for x in xs_TK]
    num_others = num_heads[1] if len(xs_TK) > 1 else 0
    num_turned = cos_TR.shape[1]
    blocks = triton.cdiv(num_heads[0], _TURNED_HEADS) + triton.cdiv(num_others, _TURNED_HEADS)
    _turn_kernel[(x.shape[0], blocks)](
        xs_TK[0], x, cos_TR if first is None else first.w_D, cos_TR if norm is None else norm.w_D, cos_TR, sin_TR,
        made[0], y, xs_TK[0].stride(0), x.stride(0), cos_TR.stride(0), sin_TR.stride(0),
        0.0 if first is None else first.eps,
        HEADS=num_heads[0], OTHERS=num_others, D=dim, HALF=num_turned // 2, NORM=_form(first),
        BLOCK_H=_TURNED_HEADS, BLOCK_R=triton.next_power_of_2(num_turned // 2),
        BLOCK_P=triton.next_power_of_2(max(1, dim - num_turned)), TYPE=TYPES[x.dtype], num_warps=4, **OPTIONS,
        **_early(x, norms, early),
    )  # fmt: skip
    return made


def gate_rows(gate_TK: Tensor, up_TK: Tensor, activation: Activation, early: bool = True) -> Tensor:
    y_TK = _rows_like(gate_TK)
    num_rows, size = gate_TK.shape
    _gate_kernel[(num_rows, triton.cdiv(size, _GATE_TILE))](
        gate_TK, up_TK, y_TK, gate_TK.stride(0), up_TK.stride(0),
        SIZE=size, TILE=_GATE_TILE, ACTIVATION=int(activation), TYPE=TYPES[up_TK.dtype], num_warps=4, **OPTIONS,
        **early_on(up_TK.device, early),
    )  # fmt: skip
    return y_TK


def _rows_like(x_TK: Tensor) -> Tensor:
    return torch.empty(x_TK.shape, dtype=x_TK.dtype, device=x_TK.device)


def _form(norm: Normalize | None) -> int:
    return 0 if norm is None else 1 if norm.kind is Kind.SCALED else 2


def _launch_sum(
    x_TK: Tensor,
    a_TK: Tensor | None,
    before: Normalize | None,
    after: Normalize | None,
    sum_TK: Tensor | None,
    y_TK: Tensor | None,
    early: bool,
) -> None:
    """Arguments that are not needed are x, which is neither read nor written for them."""
    size = x_TK.shape[1] if after is None else len(after.w_D)
    block = triton.next_power_of_2(size)
    _sum_kernel[(x_TK.shape[0], x_TK.shape[1] // size)](
        x_TK, x_TK if a_TK is None else a_TK,
        x_TK if before is None else before.w_D, x_TK if after is None else after.w_D,
        x_TK if sum_TK is None else sum_TK, x_TK if y_TK is None else y_TK,
        x_TK.stride(0), 0 if a_TK is None else a_TK.stride(0), x_TK.shape[1],
        0.0 if before is None else before.eps, 0.0 if after is None else after.eps,
        SIZE=size, BLOCK=block, ADDED=a_TK is not None, BEFORE=_form(before), AFTER=_form(after),
        TYPE=TYPES[x_TK.dtype], num_warps=min(16, max(1, block // 256)), **OPTIONS,
        **_early(x_TK, (before, after), early),
    )  # fmt: skip


def _early(x_TK: Tensor, norms: Sequence[Normalize | None], early: bool) -> dict[str, Any]:
    options = early_on(x_TK.device, early)
    weights = [norm.w_D for norm in norms if norm is not None] if options["PDL"] else []
    # Of several as much as there is of each.
    return {"AHEAD": min((bytes_ahead(w_D, 2 * WIDEST_ROW) for w_D in weights), default=0), **options}


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """As a number of a type, in fp32."""
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _ask_for_norm(w_ptr, AHEAD: tl.constexpr):
    """By the first program, for all."""
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    ask_ahead(w_ptr, tl.full([], 0, tl.int32), first.to(tl.int32), AHEAD)


@triton.jit
def _weighted(x, scale, w, FORM: tl.constexpr, TYPE: tl.constexpr):
    """x / root mean square, rounded before it is multiplied by w, or multiplied by 1 + w and rounded at the end."""
    y = x * scale
    y = rounded(y, TYPE) * w if FORM == _SCALED else y * (1.0 + w)
    return rounded(y, TYPE)


@triton.jit
def _normalized(x, w_ptr, offs, mask, eps, SIZE: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    return _weighted(x, scale, w, FORM, TYPE)


@triton.jit
def _sum_kernel(
    x_ptr, a_ptr, w_before_ptr, w_after_ptr, sum_ptr, y_ptr, stride_x, stride_a, stride_y, eps_before, eps_after,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TYPE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per head of a row: SIZE numbers side by side.
    if PDL:
        if BEFORE != _PLAIN:
            _ask_for_norm(w_before_ptr, AHEAD)
        if AFTER != _PLAIN:
            _ask_for_norm(w_after_ptr, AHEAD)
        wait_for_rows()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + row * stride_x + first + offs, mask=mask, other=0.0).to(tl.float32)
    if BEFORE != _PLAIN:
        x = _normalized(x, w_before_ptr, offs, mask, eps_before, SIZE, BEFORE, TYPE)
    if ADDED:
        a = tl.load(a_ptr + row * stride_a + first + offs, mask=mask, other=0.0).to(tl.float32)
        x = rounded(x + a, TYPE)
        tl.store(sum_ptr + row * stride_y + first + offs, x.to(TYPE), mask=mask)
    if AFTER != _PLAIN:
        y = _normalized(x, w_after_ptr, offs, mask, eps_after, SIZE, AFTER, TYPE)
        tl.store(y_ptr + row * stride_y + first + offs, y.to(TYPE), mask=mask)


@triton.jit
def _turn_heads(
    x_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr, block, eps,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Heads of one row, of which all pointers but that of the weight are the beginning."""
    offs_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_r = tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    mask_h = offs_h < HEADS
    mask_r = offs_r < HALF
    mask_p = offs_p < D - 2 * HALF
    mask_hr = mask_h[:, None] & mask_r[None, :]
    mask_hp = mask_h[:, None] & mask_p[None, :]
    places_hr = offs_h[:, None] * D + offs_r[None, :]
    places_hp = offs_h[:, None] * D + 2 * HALF + offs_p[None, :]
    first = tl.load(x_ptr + places_hr, mask=mask_hr, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + places_hr + HALF, mask=mask_hr, other=0.0).to(tl.float32)
    rest = tl.load(x_ptr + places_hp, mask=mask_hp, other=0.0).to(tl.float32)
    if NORM != _PLAIN:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        w_first = tl.load(w_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        w_second = tl.load(w_ptr + HALF + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        w_rest = tl.load(w_ptr + 2 * HALF + offs_p, mask=mask_p, other=0.0).to(tl.float32)
        first = _weighted(first, scale, w_first[None, :], NORM, TYPE)
        second = _weighted(second, scale, w_second[None, :], NORM, TYPE)
        rest = _weighted(rest, scale, w_rest[None, :], NORM, TYPE)
    cos_first = tl.load(cos_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + HALF + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + HALF + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    y_first = rounded(first * cos_first, TYPE) - rounded(second * sin_first, TYPE)
    y_second = rounded(second * cos_second, TYPE) + rounded(first * sin_second, TYPE)
    tl.store(y_ptr + places_hr, y_first.to(TYPE), mask=mask_hr)
    tl.store(y_ptr + places_hr + HALF, y_second.to(TYPE), mask=mask_hr)
    tl.store(y_ptr + places_hp, rest.to(TYPE), mask=mask_hp)


@triton.jit
def _turn_kernel(
    x_ptr, other_ptr, w_ptr, other_w_ptr, cos_ptr, sin_ptr, y_ptr, other_y_ptr,
    stride_x, stride_other, stride_cos, stride_sin, eps,
    HEADS: tl.constexpr, OTHERS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, TYPE: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # One program per BLOCK_H heads of a row: first those of x, then the others.
    if PDL:
        if NORM != _PLAIN:
            _ask_for_norm(w_ptr, AHEAD)
            _ask_for_norm(other_w_ptr, AHEAD)
        wait_for_rows()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos_row_ptr = cos_ptr + row * stride_cos
    sin_row_ptr = sin_ptr + row * stride_sin
    num_blocks = (HEADS + BLOCK_H - 1) // BLOCK_H
    if block < num_blocks:
        _turn_heads(
            x_ptr + row * stride_x, w_ptr, cos_row_ptr, sin_row_ptr, y_ptr + row * (HEADS * D), block, eps,
            HEADS, D, HALF, NORM, BLOCK_H, BLOCK_R, BLOCK_P, TYPE,
        )  # fmt: skip
    else:
        _turn_heads(
            other_ptr + row * stride_other, other_w_ptr, cos_row_ptr, sin_row_ptr, other_y_ptr + row * (OTHERS * D),
            block - num_blocks, eps, OTHERS, D, HALF, NORM, BLOCK_H, BLOCK_R, BLOCK_P, TYPE,
        )  # fmt: skip


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """activation(gate), rounded, times up. gelu's 1 + tanh(a) is 2 / (1 + exp(-2 a)), which loses no small number."""
    if ACTIVATION == _GELU_TANH:
        active = gate / (1.0 + tl.exp((gate + 0.044715 * gate * gate * gate) * _STEEPNESS))
    else:
        active = gate / (1.0 + tl.exp(-gate))
    return (rounded(active, TYPE) * up).to(TYPE)


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate, stride_up,
    SIZE: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per TILE numbers of a row.
    if PDL:
        wait_for_rows()
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = offs < SIZE
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * SIZE + offs, gated(gate, up, ACTIVATION, TYPE), mask=mask)
