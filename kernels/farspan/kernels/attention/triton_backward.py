"""Partial attention in Triton, backward: one kernel for dq, one for dk and dv; no atomics, so bits repeat.

Contracts: contract.py and packed.py. Letters and names: triton.py. Both kernels recompute the probabilities of a tile
from the final log-sum-exp; delta is the dot product of dout and out, row by row.

Source: FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.attention.contract import check_pair
from farspan.kernels.attention.launch import Rule, Tiles, choose_tiles, count_tiles, tile_table, with_plain_heads
from farspan.kernels.attention.packed import check_bounds
from farspan.kernels.attention.triton import LOG2E, bend, load_rows, load_tile, store_rows, visible, whole_range


def attend_triton_backward(
    dout_THC: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    *,
    scale: float,
    offset: int | None,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    rule = Rule(scale, offset, window, softcap)
    return _launch(dout_THC, q_THD, k_SGD, v_SGC, out_THC, lse_TH, rule, None, tiles)


def attend_packed_triton_backward(
    dout_THC: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(q_THD, k_TGD, v_TGC, 0, window)
    check_bounds(bounds, q_THD.shape[0])
    rule = Rule(scale, 0, window, softcap)
    return _launch(dout_THC, q_THD, k_TGD, v_TGC, out_THC, lse_TH, rule, bounds, tiles)


def _launch(
    dout_THC: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_TH: Tensor,
    rule: Rule,
    bounds: Sequence[int] | None,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_tokens, num_heads, qk_dim), (num_keys, num_groups, v_dim) = q_THD.shape, v_SGC.shape
    dout, q, k, v, out = (with_plain_heads(x) for x in (dout_THC, q_THD, k_SGD, v_SGC, out_THC))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if num_tokens == 0 or num_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta_TH = torch.empty(num_tokens, num_heads, dtype=lse_TH.dtype, device=q.device)
    tiles = tiles or choose_tiles(max(qk_dim, v_dim), q.element_size(), backward=True)
    constants = {
        "GROUP": num_heads // num_groups,
        "D": qk_dim,
        "C": v_dim,
        "PACKED": bounds is not None,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **rule.constants(q.dtype),
        **tiles.constants(qk_dim, v_dim),
    }
    inputs = (q, k, v, dout, lse_TH, delta_TH)
    numbers = (num_tokens, num_keys, rule.shift, rule.reach)
    strides = tuple(size for x in inputs for size in x.stride()[:2])
    by_query, by_key = (tile_table(bounds, rows, q.device) for rows in (tiles.queries, tiles.keys))
    grid = (count_tiles(num_tokens, tiles.queries) if by_query is None else by_query.shape[0], num_heads)
    _dq_kernel[grid](*inputs, out, dq, by_query, *numbers, *strides, *out.stride()[:2], *dq.stride()[:2], **constants)
    grid = (count_tiles(num_keys, tiles.keys) if by_key is None else by_key.shape[0], num_groups)
    _dkv_kernel[grid](*inputs, dk, dv, by_key, *numbers, *strides, *dk.stride()[:2], *dv.stride()[:2], **constants)
    return dq, dk, dv


@triton.jit
def _probs(
    q, k, lse, offs_t, offs_s, stop_t, stop_s, shift, window,
    BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(probabilities of a tile, derivative of the soft cap)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE) * SCALE
    slope = tl.full(scores.shape, 1.0, dtype=WIDE)
    if CAP > 0.0:
        scores = bend(scores, CAP)
        slope = 1.0 - (scores / CAP) * (scores / CAP)
    probs = tl.exp2((scores - lse[:, None]) * LOG2E)
    if MASKED:
        seen = visible(offs_t[:, None], offs_s[None, :], shift, window, BAND, WINDOWED)
        seen = seen & (offs_t[:, None] < stop_t) & (offs_s[None, :] < stop_s)
        # Also the way out for a query that sees no key at all: its lse is -inf and its row is hidden.
        probs = tl.where(seen, probs, 0.0)
    return probs, slope


@triton.jit
def _dq_keys(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k, stride_v, first, stop, offs_t, query_stop, shift, window,
    D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr,
    BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for key in range(first, stop, KEYS):
        offs_s = key + tl.arange(0, KEYS)
        k = load_rows(k_ptr, offs_s, stop, stride_k, D, BLOCK_D)
        v = load_rows(v_ptr, offs_s, stop, stride_v, C, BLOCK_C)
        probs, slope = _probs(
            q, k, lse, offs_t, offs_s, query_stop, stop, shift, window,
            BAND, WINDOWED, SCALE, CAP, MASKED, WIDE,
        )  # fmt: skip
        dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=WIDE)
        dscores = probs * (dprobs - delta[:, None]) * slope * SCALE
        dq += tl.dot(dscores.to(k.dtype), k, input_precision="ieee", out_dtype=WIDE)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, out_ptr, dq_ptr, table_ptr,
    num_tokens, num_keys, shift, window,
    stride_qt, stride_qh, stride_ks, stride_kg, stride_vs, stride_vg, stride_ot, stride_oh, stride_lt, stride_lh,
    stride_et, stride_eh, stride_yt, stride_yh, stride_dt, stride_dh,
    GROUP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # One program per (tile of queries, query head): its rows of dq, and of delta for the other kernel.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    group = head // GROUP
    query, query_stop, key, key_stop, shift = load_tile(table_ptr, tile, num_tokens, num_keys, shift, QUERIES, PACKED)
    offs_t = query + tl.arange(0, QUERIES)
    mask_t = offs_t < query_stop
    last = tl.minimum(query + QUERIES, query_stop) - 1
    first, stop, low, high = key, key_stop, key, key_stop
    if BAND:
        stop = tl.minimum(key_stop, last + shift + 1)
        high = query + shift + 1
    if WINDOWED:
        first = tl.maximum(key, query + shift - window + 1)
        low = last + shift - window + 1
    begin, end = whole_range(first, stop, low, high, KEYS)

    q = load_rows(q_ptr + head * stride_qh, offs_t, query_stop, stride_qt, D, BLOCK_D)
    dout = load_rows(dout_ptr + head * stride_oh, offs_t, query_stop, stride_ot, C, BLOCK_C)
    out = load_rows(out_ptr + head * stride_yh, offs_t, query_stop, stride_yt, C, BLOCK_C)
    lse = tl.load(lse_ptr + offs_t.to(tl.int64) * stride_lt + head * stride_lh, mask=mask_t, other=0.0)
    delta = tl.sum(dout.to(WIDE) * out.to(WIDE), 1)
    tl.store(delta_ptr + offs_t.to(tl.int64) * stride_et + head * stride_eh, delta, mask=mask_t)
    k_ptr += group * stride_kg
    v_ptr += group * stride_vg
    dq = tl.zeros([QUERIES, BLOCK_D], dtype=WIDE)
    if WINDOWED:
        dq = _dq_keys(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first, begin, offs_t, query_stop, shift,
            window, D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, True, WIDE,
        )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, begin, end, offs_t, query_stop, shift,
        window, D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, False, WIDE,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, end, stop, offs_t, query_stop, shift,
        window, D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, True, WIDE,
    )  # fmt: skip
    store_rows(dq_ptr + head * stride_dh, dq, offs_t, query_stop, stride_dt, D, BLOCK_D)


@triton.jit
def _dkv_queries(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_q, stride_o, stride_l, stride_e, first, stop, offs_s,
    key_stop, shift, window, D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, QUERIES: tl.constexpr, BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for query in range(first, stop, QUERIES):
        offs_t = query + tl.arange(0, QUERIES)
        mask_t = offs_t < stop
        q = load_rows(q_ptr, offs_t, stop, stride_q, D, BLOCK_D)
        dout = load_rows(dout_ptr, offs_t, stop, stride_o, C, BLOCK_C)
        lse = tl.load(lse_ptr + offs_t.to(tl.int64) * stride_l, mask=mask_t, other=0.0)
        delta = tl.load(delta_ptr + offs_t.to(tl.int64) * stride_e, mask=mask_t, other=0.0)
        probs, slope = _probs(
            q, k, lse, offs_t, offs_s, stop, key_stop, shift, window,
            BAND, WINDOWED, SCALE, CAP, MASKED, WIDE,
        )  # fmt: skip
        dv += tl.dot(tl.trans(probs.to(dout.dtype)), dout, input_precision="ieee", out_dtype=WIDE)
        dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=WIDE)
        dscores = probs * (dprobs - delta[:, None]) * slope * SCALE
        dk += tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision="ieee", out_dtype=WIDE)
    return dk, dv


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr,
    num_tokens, num_keys, shift, window,
    stride_qt, stride_qh, stride_ks, stride_kg, stride_vs, stride_vg, stride_ot, stride_oh, stride_lt, stride_lh,
    stride_et, stride_eh, stride_xs, stride_xg, stride_ys, stride_yg,
    GROUP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # One program per (tile of keys, key/value head): its rows of dk and dv, summed over the heads that share them.
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    key, key_stop, query, query_stop, shift = load_tile(table_ptr, tile, num_keys, num_tokens, shift, KEYS, PACKED)
    offs_s = key + tl.arange(0, KEYS)
    last = tl.minimum(key + KEYS, key_stop) - 1
    first, stop, low, high = query, query_stop, query, query_stop
    if BAND:
        first = tl.maximum(query, key - shift)
        low = last - shift
    if WINDOWED:
        stop = tl.minimum(query_stop, last - shift + window)
        high = key - shift + window
    begin, end = whole_range(first, stop, low, high, QUERIES)

    k = load_rows(k_ptr + group * stride_kg, offs_s, key_stop, stride_ks, D, BLOCK_D)
    v = load_rows(v_ptr + group * stride_vg, offs_s, key_stop, stride_vs, C, BLOCK_C)
    dk = tl.zeros([KEYS, BLOCK_D], dtype=WIDE)
    dv = tl.zeros([KEYS, BLOCK_C], dtype=WIDE)
    for member in range(0, GROUP):
        head = group * GROUP + member
        head_q_ptr = q_ptr + head * stride_qh
        head_dout_ptr = dout_ptr + head * stride_oh
        head_lse_ptr = lse_ptr + head * stride_lh
        head_delta_ptr = delta_ptr + head * stride_eh
        if BAND:
            dk, dv = _dkv_queries(
                dk, dv, k, v, head_q_ptr, head_dout_ptr, head_lse_ptr, head_delta_ptr, stride_qt, stride_ot,
                stride_lt, stride_et, first, begin, offs_s, key_stop, shift, window,
                D, C, BLOCK_D, BLOCK_C, QUERIES, BAND, WINDOWED, SCALE, CAP, True, WIDE,
            )  # fmt: skip
        dk, dv = _dkv_queries(
            dk, dv, k, v, head_q_ptr, head_dout_ptr, head_lse_ptr, head_delta_ptr, stride_qt, stride_ot,
            stride_lt, stride_et, begin, end, offs_s, key_stop, shift, window,
            D, C, BLOCK_D, BLOCK_C, QUERIES, BAND, WINDOWED, SCALE, CAP, False, WIDE,
        )  # fmt: skip
        dk, dv = _dkv_queries(
            dk, dv, k, v, head_q_ptr, head_dout_ptr, head_lse_ptr, head_delta_ptr, stride_qt, stride_ot,
            stride_lt, stride_et, end, stop, offs_s, key_stop, shift, window,
            D, C, BLOCK_D, BLOCK_C, QUERIES, BAND, WINDOWED, SCALE, CAP, True, WIDE,
        )  # fmt: skip
    store_rows(dk_ptr + group * stride_xg, dk, offs_s, key_stop, stride_xs, D, BLOCK_D)
    store_rows(dv_ptr + group * stride_yg, dv, offs_s, key_stop, stride_ys, C, BLOCK_C)
