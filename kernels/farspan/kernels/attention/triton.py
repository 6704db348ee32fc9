"""Partial attention in Triton, forward: one launch for a pair, or for all documents of a packed sequence.

Contracts: contract.py and packed.py. Letters: T query tokens, S key tokens, H query heads, G key/value heads, D head
dim of q and k, C head dim of v. In a kernel rows are the queries and keys of one tile, counted from the first token of
the tensors; a row t sees the keys `first <= s < stop` of its document with t + shift - window < s <= t + shift.
Tiles that every row sees whole are computed without a mask; scores are held in base 2.

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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def attend_triton(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    *,
    scale: float,
    offset: int | None,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    return _launch(q_THD, k_SGD, v_SGC, Rule(scale, offset, window, softcap), None, tiles)


def attend_packed_triton(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGC: Tensor,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    check_pair(q_THD, k_TGD, v_TGC, 0, window)
    check_bounds(bounds, q_THD.shape[0])
    return _launch(q_THD, k_TGD, v_TGC, Rule(scale, 0, window, softcap), bounds, tiles)


def _launch(
    q_THD: Tensor, k_SGD: Tensor, v_SGC: Tensor, rule: Rule, bounds: Sequence[int] | None, tiles: Tiles | None
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, qk_dim = q_THD.shape
    num_keys, num_groups, v_dim = v_SGC.shape
    q_THD, k_SGD, v_SGC = with_plain_heads(q_THD), with_plain_heads(k_SGD), with_plain_heads(v_SGC)
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    out_THC = torch.empty(num_tokens, num_heads, v_dim, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.empty(num_tokens, num_heads, dtype=wide, device=q_THD.device)
    if num_tokens == 0:
        return out_THC, lse_TH
    tiles = tiles or choose_tiles(max(qk_dim, v_dim), q_THD.element_size())
    table = tile_table(bounds, tiles.queries, q_THD.device)
    grid = (count_tiles(num_tokens, tiles.queries) if table is None else table.shape[0], num_heads)
    _forward_kernel[grid](
        q_THD,
        k_SGD,
        v_SGC,
        out_THC,
        lse_TH,
        table,
        num_tokens,
        num_keys,
        rule.shift,
        rule.reach,
        *q_THD.stride()[:2],
        *k_SGD.stride()[:2],
        *v_SGC.stride()[:2],
        *out_THC.stride()[:2],
        *lse_TH.stride(),
        GROUP=num_heads // num_groups,
        D=qk_dim,
        C=v_dim,
        **rule.constants(q_THD.dtype),
        **tiles.constants(qk_dim, v_dim),
        PACKED=table is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out_THC, lse_TH


@triton.jit
def load_tile(table_ptr, tile, num_rows, num_others, shift, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """(first row, end of rows, first other, end of others, shift) of a tile: rows are queries, others keys, or back."""
    if PACKED:
        entry_ptr = table_ptr + tile.to(tl.int64) * 4
        row = tl.load(entry_ptr)
        row_stop = tl.load(entry_ptr + 1)
        other = tl.load(entry_ptr + 2)
        other_stop = tl.load(entry_ptr + 3)
        return row, row_stop, other, other_stop, shift
    else:
        return tile * ROWS, num_rows, 0, num_others, shift


@triton.jit
def row_offsets(stride, ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Offsets of a tile from its first row. 32 bits: only the first row is far away, and registers are scarce."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_COLUMNS)[None, :]


@triton.jit
def row_mask(row, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    return (row + tl.arange(0, ROWS)[:, None] < stop) & (tl.arange(0, BLOCK_COLUMNS)[None, :] < COLUMNS)


@triton.jit
def load_rows(
    ptr, row, stop, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows row .. row + ROWS; zeros past `stop` and past the last column."""
    first_ptr = ptr + tl.cast(row, tl.int64) * stride
    mask = row_mask(row, stop, ROWS, COLUMNS, BLOCK_COLUMNS)
    return tl.load(first_ptr + row_offsets(stride, ROWS, BLOCK_COLUMNS), mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, x, row, stop, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    first_ptr = ptr + tl.cast(row, tl.int64) * stride
    mask = row_mask(row, stop, ROWS, COLUMNS, BLOCK_COLUMNS)
    tl.store(first_ptr + row_offsets(stride, ROWS, BLOCK_COLUMNS), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def bend(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), as the logistic function: exact limits, no overflow."""
    return CAP * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / CAP)) + 1.0))


@triton.jit
def visible(offs_t, offs_s, shift, window, BAND: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys (along the last axis) each query sees, apart from the ends of its document."""
    behind = offs_t + shift - offs_s
    seen = behind == behind
    if BAND:
        seen = seen & (behind >= 0)
    if WINDOWED:
        seen = seen & (behind < window)
    return seen


@triton.jit
def whole_range(first, stop, low, high, STEP: tl.constexpr):
    """The part of first..stop inside low..high that is cut into whole steps: those tiles need no mask."""
    begin = tl.minimum(tl.maximum(first, low), stop)
    length = tl.maximum(tl.minimum(stop, high) - begin, 0)
    return begin, begin + length // STEP * STEP


@triton.jit
def _attend_keys(
    out, total, top, q, k_ptr, v_ptr, stride_k, stride_v, first, stop, offs_t, shift, window,
    D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr,
    BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys first..stop."""
    for key in range(first, stop, KEYS):
        offs_s = key + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stop, stride_k, KEYS, D, BLOCK_D)
        v = load_rows(v_ptr, key, stop, stride_v, KEYS, C, BLOCK_C)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE) * SCALE
        if CAP > 0.0:
            scores = bend(scores, CAP)
        scores *= LOG2E
        if MASKED:
            seen = (offs_s[None, :] < stop) & visible(offs_t[:, None], offs_s[None, :], shift, window, BAND, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen no key yet keeps weights of zero, not NaN.
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        probs = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(top - pivot)
        total = total * rescale + tl.sum(probs, 1)
        out = out * rescale[:, None]
        out += tl.dot(probs.to(v.dtype), v, input_precision="ieee", out_dtype=WIDE)
        top = higher
    return out, total, top


# Lengths and windows are any numbers: a kernel for each kind of them would be compiled in the middle of a request.
@triton.jit(do_not_specialize=["num_tokens", "num_keys", "shift", "window"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, num_tokens, num_keys, shift, window,
    stride_qt, stride_qh, stride_ks, stride_kg, stride_vs, stride_vg, stride_ot, stride_oh, stride_lt, stride_lh,
    GROUP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BAND: tl.constexpr, WINDOWED: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # One program per (tile of queries, query head): its rows of out and lse.
    # Later tiles see more keys: started first, they do not end last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    group = head // GROUP
    query, query_stop, key, key_stop, shift = load_tile(table_ptr, tile, num_tokens, num_keys, shift, QUERIES, PACKED)
    offs_t = query + tl.arange(0, QUERIES)
    last = tl.minimum(query + QUERIES, query_stop) - 1
    first, stop, low, high = key, key_stop, key, key_stop
    if BAND:
        stop = tl.minimum(key_stop, last + shift + 1)
        high = query + shift + 1
    if WINDOWED:
        first = tl.maximum(key, query + shift - window + 1)
        low = last + shift - window + 1
    begin, end = whole_range(first, stop, low, high, KEYS)

    q = load_rows(q_ptr + head * stride_qh, query, query_stop, stride_qt, QUERIES, D, BLOCK_D)
    k_ptr += group * stride_kg
    v_ptr += group * stride_vg
    out = tl.zeros([QUERIES, BLOCK_C], dtype=WIDE)
    total = tl.zeros([QUERIES], dtype=WIDE)
    top = tl.full([QUERIES], float("-inf"), dtype=WIDE)
    if WINDOWED:
        out, total, top = _attend_keys(
            out, total, top, q, k_ptr, v_ptr, stride_ks, stride_vs, first, begin, offs_t, shift, window,
            D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, True, WIDE,
        )  # fmt: skip
    out, total, top = _attend_keys(
        out, total, top, q, k_ptr, v_ptr, stride_ks, stride_vs, begin, end, offs_t, shift, window,
        D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, False, WIDE,
    )  # fmt: skip
    out, total, top = _attend_keys(
        out, total, top, q, k_ptr, v_ptr, stride_ks, stride_vs, end, stop, offs_t, shift, window,
        D, C, BLOCK_D, BLOCK_C, KEYS, BAND, WINDOWED, SCALE, CAP, True, WIDE,
    )  # fmt: skip

    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe_total)) * LN2)
    store_rows(out_ptr + head * stride_oh, out / safe_total[:, None], query, query_stop, stride_ot, QUERIES, C, BLOCK_C)
    tl.store(lse_ptr + offs_t.to(tl.int64) * stride_lt + head * stride_lh, lse, mask=offs_t < query_stop)
