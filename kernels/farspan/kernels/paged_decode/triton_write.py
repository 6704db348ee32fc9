"""Keys and values of new tokens into their pages, both by one Triton kernel. Letters: contract.py; T tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.early import early_on, wait_for_rows
from farspan.kernels.paged_decode.launch import plain_last


def write_pages_triton(
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    page_T: Tensor,
    slot_T: Tensor,
    early: bool = True,
) -> None:
    """`write.write_pages`, on one device."""
    num_tokens, num_groups, qk_dim = k_TGD.shape
    v_dim = v_TGC.shape[2]
    assert keys_PSGD.shape[2:] == (num_groups, qk_dim), "the keys of this layer"
    assert values_PSGC.shape[2:] == (num_groups, v_dim), "the values of this layer"
    # A pool is far too large to be copied: its views must be plain already.
    assert keys_PSGD.stride(3) == values_PSGC.stride(3) == 1, "the head dim of pages must be contiguous"
    if num_tokens == 0:
        return
    k_TGD, v_TGC = plain_last(k_TGD), plain_last(v_TGC)
    _write_kernel[(num_tokens,)](
        k_TGD, v_TGC, page_T, slot_T, keys_PSGD, values_PSGC,
        *k_TGD.stride()[:2], *v_TGC.stride()[:2], page_T.stride(0), slot_T.stride(0),
        *keys_PSGD.stride()[:3], *values_PSGC.stride()[:3],
        GROUPS=num_groups, D=qk_dim, C=v_dim,
        BLOCK_K=triton.next_power_of_2(num_groups * qk_dim), BLOCK_V=triton.next_power_of_2(num_groups * v_dim),
        **early_on(k_TGD.device, early),
    )  # fmt: skip


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, page_ptr, slot_ptr, keys_ptr, values_ptr,
    stride_kt, stride_kg, stride_vt, stride_vg, stride_p, stride_s,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    GROUPS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # One program per token: all heads of its key and of its value.
    if PDL:
        wait_for_rows()
    token = tl.program_id(0).to(tl.int64)
    page = tl.load(page_ptr + token * stride_p).to(tl.int64)
    slot = tl.load(slot_ptr + token * stride_s).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    group, d, mask = offs_k // D, offs_k % D, offs_k < GROUPS * D
    key = tl.load(k_ptr + token * stride_kt + group * stride_kg + d, mask=mask)
    tl.store(keys_ptr + page * stride_kp + slot * stride_ks + group * stride_kh + d, key, mask=mask)
    offs_v = tl.arange(0, BLOCK_V)
    group, c, mask = offs_v // C, offs_v % C, offs_v < GROUPS * C
    value = tl.load(v_ptr + token * stride_vt + group * stride_vg + c, mask=mask)
    tl.store(values_ptr + page * stride_vp + slot * stride_vs + group * stride_vh + c, value, mask=mask)
