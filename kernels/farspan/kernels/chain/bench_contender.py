"""Linear layers on 3 to 64 rows by matrix units: a contender of the bench, which nothing else uses.

Letters: contract.py. y^T = w x^T: outputs are the 128 rows of a matrix instruction and the few rows its columns, so
that none are wasted. Where outputs are too few for all processors of a GPU, K is cut into S shares, whose sums a second
kernel adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.chain.triton_rows import TYPES

# Weights of a program on their way: 7 times 16 KiB, several times what a processor needs to be reading all the time.
_OUTPUTS, _INPUTS, _STAGES, _TILE = 128, 64, 8, 1024
# So many programs keep the processors of an H100 or H200 at work, one each.
_PROGRAMS = 128


def multiply_by_shares(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T, rounded. Whole tiles only."""
    (num_rows, size), num_outputs = x_TK.shape, w_NK.shape[0]
    shares = num_shares(num_outputs, size)
    blocks = num_outputs // _OUTPUTS
    assert num_outputs % _OUTPUTS == size % (shares * _INPUTS) == 0, "whole tiles"
    part_STN = torch.empty((shares, num_rows, num_outputs), dtype=torch.float32, device=x_TK.device)
    _shares_kernel[(blocks, shares)](
        x_TK, w_NK, part_STN, x_TK.stride(0), w_NK.stride(0), num_rows,
        N=num_outputs, SHARE=size // shares, BLOCK_N=_OUTPUTS, BLOCK_K=_INPUTS,
        BLOCK_T=max(16, triton.next_power_of_2(num_rows)), num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    y_TN = torch.empty((num_rows, num_outputs), dtype=x_TK.dtype, device=x_TK.device)
    _add_shares_kernel[(triton.cdiv(y_TN.numel(), _TILE),)](
        part_STN, y_TN, y_TN.numel(), SHARES=shares, TILE=_TILE, TYPE=TYPES[x_TK.dtype], num_warps=4
    )
    return y_TN


def num_shares(num_outputs: int, size: int) -> int:
    """As few as give every processor a program, and as whole tiles allow."""
    shares = 1
    while num_outputs // _OUTPUTS * shares < _PROGRAMS and size % (2 * shares * _INPUTS) == 0:
        shares *= 2
    return shares


@triton.jit
def _shares_kernel(
    x_ptr, w_ptr, part_ptr, stride_x, stride_w, num_rows, N: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # One program per BLOCK_N outputs and share of the inputs, of all rows.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * SHARE + tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    w_nk_ptr = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]
    x_kt_ptr = x_ptr + offs_t.to(tl.int64)[None, :] * stride_x + offs_k[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for k in range(0, SHARE, BLOCK_K):
        w = tl.load(w_nk_ptr + k)
        x = tl.load(x_kt_ptr + k, mask=mask_t[None, :], other=0.0)
        sums = tl.dot(w, x, sums)
    place = (tl.program_id(1) * num_rows + offs_t).to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(part_ptr + place, sums, mask=mask_t[None, :])


@triton.jit
def _add_shares_kernel(
    part_ptr, y_ptr, size, SHARES: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    # One program per TILE numbers.
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = offs < size
    sums = tl.zeros([TILE], dtype=tl.float32)
    for share in range(SHARES):
        sums += tl.load(part_ptr + share * size + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, sums.to(TYPE), mask=mask)
