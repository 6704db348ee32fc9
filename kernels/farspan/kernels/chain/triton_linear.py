"""Linear layers on one or two bf16 rows in Triton: as fast as the weights can be read. Letters: contract.py.

What follows a linear layer in a layer of a decoder, a gate or a residual sum, is done with its sums, which are fp32
and rounded where their step ends. Where a kernel can be launched early (early.py), its weights are on their way before
the rows are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.chain.contract import Activation
from farspan.kernels.chain.triton_rows import TYPES, gated, rounded
from farspan.kernels.early import ask_ahead, bytes_ahead, early_on, wait_for_rows

# Up to how many rows: from there on cuBLAS is faster (measured, decision 0050).
MOST_ROWS = 2
_EIGHT = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program multiplies at once: four rows of 1024 weights are four loads of 16 bytes for each thread."""

    outputs: int = 4
    inputs: int = 1024
    num_warps: int = 4
    ahead_bytes: int = 4096
    """Asked for ahead of an output's weights: for all programs that Hopper holds less than half of its L2 cache."""


CHOSEN = Tiles()


def multiply_few(
    x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None, a_TN: Tensor | None, early: bool = True, tiles: Tiles = CHOSEN
) -> Tensor:
    """x w^T + b, rounded; plus `a`, where it is given."""
    y_TN = torch.empty((x_TK.shape[0], w_NK.shape[0]), dtype=x_TK.dtype, device=x_TK.device)
    num_outputs = w_NK.shape[0]
    _multiply_kernel[(triton.cdiv(num_outputs, tiles.outputs),)](
        x_TK, w_NK, w_NK if b_N is None else b_N, x_TK if a_TN is None else a_TN, y_TN,
        x_TK.stride(0), w_NK.stride(0), 0 if a_TN is None else a_TN.stride(0),
        N=num_outputs, BIASED=b_N is not None, ADDED=a_TN is not None, **_launch(x_TK, [w_NK], early, tiles),
    )  # fmt: skip
    return y_TN


def multiply_gated_few(
    x_TK: Tensor,
    gate_NK: Tensor,
    up_NK: Tensor,
    activation: Activation,
    early: bool = True,
    tiles: Tiles = CHOSEN,
) -> Tensor:
    """activation(x gate^T) * x up^T"""
    y_TN = torch.empty((x_TK.shape[0], gate_NK.shape[0]), dtype=x_TK.dtype, device=x_TK.device)
    num_outputs = gate_NK.shape[0]
    _multiply_gated_kernel[(triton.cdiv(num_outputs, tiles.outputs),)](
        x_TK, gate_NK, up_NK, y_TN, x_TK.stride(0), gate_NK.stride(0), up_NK.stride(0),
        N=num_outputs, ACTIVATION=int(activation), **_launch(x_TK, [gate_NK, up_NK], early, tiles),
    )  # fmt: skip
    return y_TN


def _launch(x_TK: Tensor, weights: Sequence[Tensor], early: bool, tiles: Tiles) -> dict[str, Any]:
    num_rows, size = x_TK.shape
    options = early_on(x_TK.device, early)
    ahead = min(bytes_ahead(w_NK, tiles.ahead_bytes // len(weights)) for w_NK in weights) if options["PDL"] else 0
    return {
        "ROWS": num_rows,
        "K": size,
        "TYPE": TYPES[x_TK.dtype],
        "BLOCK_N": tiles.outputs,
        "BLOCK_K": min(tiles.inputs, max(16, triton.next_power_of_2(size))),
        "AHEAD": ahead,
        "num_warps": tiles.num_warps,
        **options,
    }


@triton.jit
def _ask_for_outputs(w_ptr, stride_w, N: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    first = tl.program_id(0) * BLOCK_N
    ask_ahead(w_ptr + first.to(tl.int64) * stride_w, stride_w, tl.minimum(N - first, BLOCK_N), AHEAD)


@triton.jit
def _by_eights(products, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // _EIGHT, _EIGHT]), 2)


@triton.jit
def _sums(
    x_ptr, w_ptr, stride_x, stride_w, offs_n, mask_n,
    ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each of two rows the sums of BLOCK_N outputs; those of a row that is not there are zero.

    The eight weights of a load are summed by the thread that has them: what is kept are not products but sums.
    """
    offs_k = tl.arange(0, BLOCK_K)
    w_rows_ptr = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w
    sums_0 = tl.zeros([BLOCK_N, BLOCK_K // _EIGHT], dtype=tl.float32)
    sums_1 = tl.zeros([BLOCK_N, BLOCK_K // _EIGHT], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        mask_nk = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_rows_ptr + (k + offs_k)[None, :], mask=mask_nk, other=0.0).to(tl.float32)
        x_0 = tl.load(x_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        sums_0 += _by_eights(w * x_0[None, :], BLOCK_N, BLOCK_K)
        if ROWS > 1:
            x_1 = tl.load(x_ptr + stride_x + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            sums_1 += _by_eights(w * x_1[None, :], BLOCK_N, BLOCK_K)
    return tl.sum(sums_0, 1), tl.sum(sums_1, 1)


@triton.jit
def _put(sums, b_ptr, a_ptr, y_ptr, offs_n, mask_n, BIASED: tl.constexpr, ADDED: tl.constexpr, TYPE: tl.constexpr):
    """One row of outputs: all pointers but that of the bias are its beginning."""
    if BIASED:
        sums += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = rounded(sums, TYPE)
    if ADDED:
        y += tl.load(a_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_n, y.to(TYPE), mask=mask_n)


@triton.jit
def _multiply_kernel(
    x_ptr, w_ptr, b_ptr, a_ptr, y_ptr, stride_x, stride_w, stride_a, N: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TYPE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per BLOCK_N outputs, of all rows.
    if PDL:
        _ask_for_outputs(w_ptr, stride_w, N, BLOCK_N, AHEAD)
        wait_for_rows()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y_0, y_1 = _sums(x_ptr, w_ptr, stride_x, stride_w, offs_n, mask_n, ROWS, K, BLOCK_N, BLOCK_K)
    _put(y_0, b_ptr, a_ptr, y_ptr, offs_n, mask_n, BIASED, ADDED, TYPE)
    if ROWS > 1:
        _put(y_1, b_ptr, a_ptr + stride_a, y_ptr + N, offs_n, mask_n, BIASED, ADDED, TYPE)


@triton.jit
def _put_gated(gate, up, y_ptr, offs_n, mask_n, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    y = gated(rounded(gate, TYPE), rounded(up, TYPE), ACTIVATION, TYPE)
    tl.store(y_ptr + offs_n, y, mask=mask_n)


@triton.jit
def _multiply_gated_kernel(
    x_ptr, gate_ptr, up_ptr, y_ptr, stride_x, stride_gate, stride_up, N: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TYPE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per BLOCK_N gates and what they gate, of all rows.
    if PDL:
        _ask_for_outputs(gate_ptr, stride_gate, N, BLOCK_N, AHEAD)
        _ask_for_outputs(up_ptr, stride_up, N, BLOCK_N, AHEAD)
        wait_for_rows()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gate_0, gate_1 = _sums(x_ptr, gate_ptr, stride_x, stride_gate, offs_n, mask_n, ROWS, K, BLOCK_N, BLOCK_K)
    up_0, up_1 = _sums(x_ptr, up_ptr, stride_x, stride_up, offs_n, mask_n, ROWS, K, BLOCK_N, BLOCK_K)
    _put_gated(gate_0, up_0, y_ptr, offs_n, mask_n, ACTIVATION, TYPE)
    if ROWS > 1:
        _put_gated(gate_1, up_1, y_ptr + N, offs_n, mask_n, ACTIVATION, TYPE)
