"""Attention over pages in Triton: equal shares of the line of tiles (partition.py), then one merge.

Contract and letters: contract.py. A tile is TOKENS tokens of a row; M query heads share a key/value head, and the Q * M
query rows that read it are cut into blocks of at most ROWS, each of them a segment, (row * G + group) * blocks + block.
Lengths and tables are read on the device; the grid depends on shapes alone. Scores are held in base 2.
Both kernels are launched early where the GPU can (kernels/early.py): the keys of the last token were written just now.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.attention.triton import LN2, LOG2E, bend
from farspan.kernels.early import early_on, wait_for_rows
from farspan.kernels.paged_decode.contract import check_pages
from farspan.kernels.paged_decode.launch import Launch, choose_launch, plain_last


def attend_pages_triton(
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    log_weights_PSG: Tensor | None = None,
    launch: Launch | None = None,
    early: bool = True,
) -> tuple[Tensor, Tensor]:
    check_pages(q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B, causal, window, log_weights_PSG)
    num_rows, num_queries, num_heads, qk_dim = q_BQHD.shape
    _, num_slots, num_groups, v_dim = values_PSGC.shape
    group, device = num_heads // num_groups, q_BQHD.device
    # A pool is far too large to be copied: its views must be plain already.
    assert keys_PSGD.stride(3) == values_PSGC.stride(3) == 1, "the head dim of pages must be contiguous"
    launch = launch or choose_launch(max(qk_dim, v_dim), q_BQHD.element_size(), num_queries * group, device)
    wide = torch.promote_types(q_BQHD.dtype, torch.float32)
    out_BQHC = torch.empty(num_rows, num_queries, num_heads, v_dim, dtype=q_BQHD.dtype, device=device)
    lse_BQH = torch.empty(num_rows, num_queries, num_heads, dtype=wide, device=device)
    if out_BQHC.numel() == 0:
        return out_BQHC, lse_BQH
    q_BQHD, tables_BN, lengths_B = plain_last(q_BQHD), plain_last(tables_BN), lengths_B.contiguous()
    num_blocks = launch.num_blocks(num_queries * group)
    num_segments = num_rows * num_groups * num_blocks
    most_tiles = num_segments * launch.num_tiles(tables_BN.shape[1] * num_slots)
    num_programs = max(1, min(launch.num_programs, most_tiles))
    part_out = torch.empty(num_programs + num_segments, launch.rows, v_dim, dtype=wide, device=device)
    part_lse = torch.empty(num_programs + num_segments, launch.rows, dtype=wide, device=device)
    line = {
        "TOKENS": launch.tokens,
        "QUERIES": num_queries,
        "WINDOWED": window is not None,
        "SEGMENTS": num_groups * num_blocks,
        "BLOCK_B": triton.next_power_of_2(num_rows),
        "ROWS": launch.rows,
        "GROUP": group,
        "GROUPS": num_groups,
        "BLOCKS": num_blocks,
        "C": v_dim,
        "BLOCK_C": launch.padded(v_dim),
        **early_on(device, early),
    }
    weights = log_weights_PSG
    _pieces_kernel[(num_programs,)](
        q_BQHD, keys_PSGD, values_PSGC, weights, tables_BN, lengths_B, part_out, part_lse, num_rows, window or 0,
        *q_BQHD.stride()[:3], *keys_PSGD.stride()[:3], *values_PSGC.stride()[:3],
        *((0, 0, 0) if weights is None else weights.stride()), tables_BN.stride(0),
        **line, SLOTS=num_slots, D=qk_dim, BLOCK_D=launch.padded(qk_dim), BLOCK_R=launch.padded(launch.rows),
        CAUSAL=causal, WEIGHTED=weights is not None, SCALE=scale, CAP=softcap or 0.0,
        WIDE=tl.float64 if wide == torch.float64 else tl.float32,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    _merge_pieces_kernel[(num_segments, launch.rows)](
        part_out, part_lse, lengths_B, out_BQHC, lse_BQH, num_rows, window or 0, num_programs,
        **line, BLOCK_P=launch.merged_pieces, num_warps=launch.merge_warps,
    )  # fmt: skip
    return out_BQHC, lse_BQH


@triton.jit
def _tiles_of_rows(lengths_ptr, num_rows, window, TOKENS: tl.constexpr, QUERIES: tl.constexpr,
                   WINDOWED: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """(first tile, number of tiles) that each row's queries see; partition.tiles_of."""
    offs_b = tl.arange(0, BLOCK_B)
    length = tl.load(lengths_ptr + offs_b, mask=offs_b < num_rows, other=0).to(tl.int32)
    first = tl.zeros([BLOCK_B], dtype=tl.int32)
    if WINDOWED:
        first = tl.minimum(tl.maximum(length - QUERIES - window + 1, 0), length) // TOKENS
    return first, (length + TOKENS - 1) // TOKENS - first


@triton.jit
def _pick(values, at, BLOCK_B: tl.constexpr):
    """Entry `at` of a vector."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_B) == at, values, 0))


@triton.jit
def _pieces_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr, num_rows, window,
    stride_qb, stride_qq, stride_qh, stride_kp, stride_ks, stride_kg, stride_vp, stride_vs, stride_vg,
    stride_wp, stride_ws, stride_wg, stride_tb,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, WINDOWED: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # One program per share of the line of tiles: the pieces in it, one after another.
    if PDL:
        wait_for_rows()
    program = tl.program_id(0)
    firsts, tiles = _tiles_of_rows(lengths_ptr, num_rows, window, TOKENS, QUERIES, WINDOWED, BLOCK_B)
    ends = tl.cumsum(tiles, 0) * SEGMENTS
    total = tl.sum(tiles) * SEGMENTS
    working = tl.minimum(total, tl.num_programs(0))
    safe_working = tl.maximum(working, 1)
    at = (program.to(tl.int64) * total // safe_working).to(tl.int32)
    share_stop = ((program + 1).to(tl.int64) * total // safe_working).to(tl.int32)
    share_stop = tl.where(program < working, share_stop, at)
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    while at < share_stop:
        row = tl.sum((ends <= at).to(tl.int32))
        row_tiles = _pick(tiles, row, BLOCK_B)
        inside = at - _pick(ends, row, BLOCK_B) + row_tiles * SEGMENTS
        tile = inside % row_tiles
        tile_stop = tl.minimum(row_tiles, tile + share_stop - at)
        segment_of_row = inside // row_tiles
        group = (segment_of_row // BLOCKS).to(tl.int64)
        query_rows = segment_of_row % BLOCKS * ROWS + offs_r
        mask_r = (offs_r < ROWS) & (query_rows < QUERIES * GROUP)
        query = query_rows // GROUP
        head = group * GROUP + query_rows % GROUP
        length = tl.load(lengths_ptr + row).to(tl.int32)
        # The last token a query sees.
        last_r = length - QUERIES + query if CAUSAL else length - 1 + query * 0
        wide_row = row.to(tl.int64)
        q_rows_ptr = q_ptr + wide_row * stride_qb + query.to(tl.int64) * stride_qq + head * stride_qh
        q = tl.load(q_rows_ptr[:, None] + offs_d[None, :], mask=mask_r[:, None] & (offs_d < D)[None, :], other=0.0)
        row_table_ptr = table_ptr + wide_row * stride_tb
        first = _pick(firsts, row, BLOCK_B)
        lowest = tl.maximum(length - QUERIES - window + 1, 0) if WINDOWED else 0

        out = tl.zeros([BLOCK_R, BLOCK_C], dtype=WIDE)
        sums = tl.zeros([BLOCK_R], dtype=WIDE)
        top = tl.full([BLOCK_R], float("-inf"), dtype=WIDE)
        for index in range(first + tile, first + tile_stop):
            offs_t = index * TOKENS + tl.arange(0, TOKENS)
            # What no query sees is not read: it may be NaN, and its page any number.
            mask_t = (offs_t >= lowest) & (offs_t < length)
            page = tl.load(row_table_ptr + offs_t // SLOTS, mask=mask_t, other=0).to(tl.int64)
            slot = (offs_t % SLOTS).to(tl.int64)
            k_rows_ptr = k_ptr + page * stride_kp + slot * stride_ks + group * stride_kg
            v_rows_ptr = v_ptr + page * stride_vp + slot * stride_vs + group * stride_vg
            k = tl.load(k_rows_ptr[:, None] + offs_d[None, :], mask=mask_t[:, None] & (offs_d < D)[None, :], other=0.0)
            v = tl.load(v_rows_ptr[:, None] + offs_c[None, :], mask=mask_t[:, None] & (offs_c < C)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=WIDE) * SCALE
            if CAP > 0.0:
                scores = bend(scores, CAP)
            if WEIGHTED:
                weight_rows_ptr = weight_ptr + page * stride_wp + slot * stride_ws + group * stride_wg
                scores += tl.load(weight_rows_ptr, mask=mask_t, other=0.0).to(WIDE)[None, :]
            behind = last_r[:, None] - offs_t[None, :]
            visible = behind >= 0
            if WINDOWED:
                visible = visible & (behind < window)
            scores = tl.where(visible, scores * LOG2E, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A query that has seen no key yet keeps weights of zero, not NaN.
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            probs = tl.exp2(scores - pivot[:, None])
            rescale = tl.exp2(top - pivot)
            sums = sums * rescale + tl.sum(probs, 1)
            out = out * rescale[:, None]
            out += tl.dot(probs.to(v.dtype), v, input_precision="ieee", out_dtype=WIDE)
            top = higher

        empty = sums == 0.0
        safe_sums = tl.where(empty, 1.0, sums)
        lse = tl.where(empty, float("-inf"), (top + tl.log2(safe_sums)) * LN2)
        place = program.to(tl.int64) + wide_row * SEGMENTS + segment_of_row
        place_rows = place * ROWS + offs_r
        tl.store(lse_ptr + place_rows, lse, mask=mask_r)
        tl.store(
            out_ptr + place_rows[:, None] * C + offs_c[None, :],
            out / safe_sums[:, None],
            mask=mask_r[:, None] & (offs_c < C)[None, :],
        )
        at += tile_stop - tile


@triton.jit
def _merge_pieces_kernel(
    part_out_ptr, part_lse_ptr, lengths_ptr, out_ptr, lse_ptr, num_rows, window, num_programs,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, WINDOWED: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program per query row of a segment: its pieces lie one after another in the workspace.
    if PDL:
        wait_for_rows()
    segment = tl.program_id(0)
    r = tl.program_id(1)
    row = segment // SEGMENTS
    segment_of_row = segment % SEGMENTS
    query_row = segment_of_row % BLOCKS * ROWS + r
    if query_row < QUERIES * GROUP:
        _, tiles = _tiles_of_rows(lengths_ptr, num_rows, window, TOKENS, QUERIES, WINDOWED, BLOCK_B)
        total = tl.sum(tiles).to(tl.int64) * SEGMENTS
        working = tl.minimum(total, num_programs)
        row_tiles = _pick(tiles, row, BLOCK_B)
        begin = (_pick(tl.cumsum(tiles, 0), row, BLOCK_B) - row_tiles) * SEGMENTS + segment_of_row * row_tiles
        safe_total = tl.maximum(total, 1)
        first = segment + ((begin + 1) * working - 1) // safe_total
        stop = segment + ((begin + row_tiles) * working - 1) // safe_total + 1
        # A row of no tokens has no piece.
        stop = tl.where(row_tiles > 0, stop, first)

        offs_c = tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        top = tl.full([1], float("-inf"), dtype=lse_ptr.dtype.element_ty)
        sums = tl.zeros([1], dtype=lse_ptr.dtype.element_ty)
        out = tl.zeros([BLOCK_C], dtype=lse_ptr.dtype.element_ty)
        for place in range(first, stop, BLOCK_P):
            offs_p = place + tl.arange(0, BLOCK_P)
            mask_p = offs_p < stop
            rows = offs_p.to(tl.int64) * ROWS + r
            lse = tl.load(part_lse_ptr + rows, mask=mask_p, other=float("-inf"))
            part = tl.load(
                part_out_ptr + rows[:, None] * C + offs_c[None, :], mask=mask_p[:, None] & mask_c[None, :], other=0.0
            )
            higher = tl.maximum(top, tl.max(lse, 0))
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(lse - pivot)
            rescale = tl.exp(top - pivot)
            sums = sums * rescale + tl.sum(weights, 0)
            out = out * rescale + tl.sum(part * weights[:, None], 0)
            top = higher
        empty = sums == 0.0
        safe_sums = tl.where(empty, 1.0, sums)
        group = segment_of_row // BLOCKS
        head = group * GROUP + query_row % GROUP
        out_row = (row.to(tl.int64) * QUERIES + query_row // GROUP) * (GROUP * GROUPS) + head
        tl.store(out_ptr + out_row * C + offs_c, (out / safe_sums).to(out_ptr.dtype.element_ty), mask=mask_c)
        merged = tl.where(empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log(safe_sums))
        tl.store(lse_ptr + out_row + tl.arange(0, 1), merged)
