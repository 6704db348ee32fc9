"""Merge attention computed over disjoint key ranges, in Triton. Contract, letters and source: reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def merge_partials_triton(a_THC: Tensor, a_lse_TH: Tensor, b_THC: Tensor, b_lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over both ranges. Weights are computed in the type of lse (fp32, or fp64 for fp64 attention)."""
    num_tokens, num_heads, v_dim = a_THC.shape
    a_THC, b_THC = (x if x.stride(-1) == 1 else x.contiguous() for x in (a_THC, b_THC))
    out_THC = torch.empty(a_THC.shape, dtype=a_THC.dtype, device=a_THC.device)
    lse_TH = torch.empty(a_lse_TH.shape, dtype=a_lse_TH.dtype, device=a_THC.device)
    if lse_TH.numel() > 0:
        _merge_partials_kernel[(num_tokens, num_heads)](
            a_THC,
            a_lse_TH,
            b_THC,
            b_lse_TH,
            out_THC,
            lse_TH,
            *a_THC.stride()[:2],
            *a_lse_TH.stride(),
            *b_THC.stride()[:2],
            *b_lse_TH.stride(),
            *out_THC.stride()[:2],
            *lse_TH.stride(),
            C=v_dim,
            BLOCK_C=triton.next_power_of_2(v_dim),
        )
    return out_THC, lse_TH


@triton.jit
def _merge_partials_kernel(
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, out_ptr, lse_ptr, stride_at, stride_ah, stride_alt, stride_alh,
    stride_bt, stride_bh, stride_blt, stride_blh, stride_ot, stride_oh, stride_lt, stride_lh,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program per (token, head) row; a row is C contiguous values.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    lse_a = tl.load(a_lse_ptr + token * stride_alt + head * stride_alh)
    lse_b = tl.load(b_lse_ptr + token * stride_blt + head * stride_blh)
    top = tl.maximum(lse_a, lse_b)
    # A query that saw no key in either range has lse = -inf: its output is zero, not NaN.
    pivot = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(lse_a - pivot)
    weight_b = tl.exp(lse_b - pivot)
    total = weight_a + weight_b
    safe_total = tl.where(total == 0.0, 1.0, total)
    a = tl.load(a_ptr + token * stride_at + head * stride_ah + offs_c, mask=mask_c, other=0.0).to(lse_a.dtype)
    b = tl.load(b_ptr + token * stride_bt + head * stride_bh + offs_c, mask=mask_c, other=0.0).to(lse_a.dtype)
    out = (weight_a * a + weight_b * b) / safe_total
    out_row_ptr = out_ptr + token * stride_ot + head * stride_oh
    tl.store(out_row_ptr + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask_c)
    lse = tl.where(total == 0.0, float("-inf"), pivot + tl.log(safe_total))
    tl.store(lse_ptr + token * stride_lt + head * stride_lh, lse)
