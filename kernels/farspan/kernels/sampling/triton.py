"""A token for each row of logits in Triton, in tiles of the vocabulary: highest logits, sums, the token. Neither top-k
nor top-p. Contract and letters: contract.py; S tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.sampling.contract import Chosen, Draws, Sampling, check_rows

_TILE = 4096


def load_triton() -> Sampling:
    return Sampling(sample_triton, cuts=False)


def sample_triton(
    logits_NV: Tensor, draws: Draws, points_N: Tensor, told_N: Tensor | None = None, tile: int = _TILE
) -> Chosen:
    check_rows(logits_NV, draws, points_N, told_N)
    logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    rows, size = logits_NV.shape
    num_tiles = triton.cdiv(size, tile)
    tokens_N = torch.empty(rows, dtype=torch.int64, device=logits_NV.device)
    best_N, margin_N, lse_N = made = points_N.new_empty(3, rows)
    if rows == 0:
        return Chosen(tokens_N, best_N, margin_N, None if told_N is None else lse_N)
    tops_NS, sums_NS, wholes_NS = scratch = points_N.new_empty(3, rows, num_tiles)
    firsts_NS = tokens_N.new_empty(rows, num_tiles)
    asked = (draws.temperature_N, draws.least_N)
    # Without anybody to be told, any pointer does.
    told, tells = (tokens_N, False) if told_N is None else (told_N, True)
    sizes = {"S": num_tiles, "BLOCK_V": tile, "num_warps": 8}
    _tops_kernel[(rows, num_tiles)](logits_NV, tops_NS, firsts_NS, logits_NV.stride(0), size, **sizes)
    sizes["BLOCK_S"] = triton.next_power_of_2(num_tiles)
    _sums_kernel[(rows, num_tiles)](
        logits_NV, *asked, told, tops_NS, sums_NS, wholes_NS, logits_NV.stride(0), size, TELLS=tells, **sizes
    )
    _choose_kernel[(rows,)](
        logits_NV, *asked, points_N, told, tops_NS, firsts_NS, sums_NS, wholes_NS, tokens_N, best_N, margin_N, lse_N,
        logits_NV.stride(0), size, TELLS=tells, **sizes,
    )  # fmt: skip
    assert len(made) == len(scratch) == 3, "as many as are written"
    return Chosen(tokens_N, best_N, margin_N, lse_N if tells else None)


@triton.jit
def _tops_kernel(x_ptr, tops_ptr, firsts_ptr, stride_n, size, S: tl.constexpr, BLOCK_V: tl.constexpr):
    # One program per tile of a row: its highest logit, NaN where any is, and the first token that has it.
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + row * stride_n + offs_v, mask=offs_v < size, other=float("-inf")).to(tl.float64)
    broken = tl.max((x != x).to(tl.int32), axis=0)
    x = tl.where(x != x, float("-inf"), x)
    top = tl.max(x, axis=0)
    first = tl.min(tl.where(x == top, offs_v, size - 1), axis=0)
    tl.store(tops_ptr + row * S + tile, tl.where(broken > 0, float("nan"), top))
    tl.store(firsts_ptr + row * S + tile, first.to(tl.int64))


@triton.jit
def _highest(tops_ptr, row, S: tl.constexpr, BLOCK_S: tl.constexpr):
    # (highest logit of a row, whether all of its logits are numbers that something may be drawn of)
    offs_s = tl.arange(0, BLOCK_S)
    tops = tl.load(tops_ptr + row * S + offs_s, mask=offs_s < S, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), axis=0) > 0
    highest = tl.max(tl.where(tops != tops, float("-inf"), tops), axis=0)
    sound = (highest > float("-inf")) & (highest < float("inf")) & (broken == 0)
    return tl.where(broken, float("nan"), highest), sound


@triton.jit
def _weights(x_ptr, offs_v, size, highest, temperature, least):
    # Of a tile: 0 where a token is cut, and behind the last one.
    x = tl.load(x_ptr + offs_v, mask=offs_v < size, other=float("-inf")).to(tl.float64)
    scores = (x - highest) / temperature
    return tl.where((scores < least) | (scores == float("-inf")), 0.0, tl.exp(scores))


@triton.jit
def _sums_kernel(
    x_ptr, temperature_ptr, least_ptr, told_ptr, tops_ptr, sums_ptr, wholes_ptr, stride_n, size,
    TELLS: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One program per tile of a row: the sum of its weights, and of exp(logit) over the highest.
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    highest, sound = _highest(tops_ptr, row, S, BLOCK_S)
    temperature = tl.load(temperature_ptr + row)
    if sound & (temperature > 0.0):
        least = tl.load(least_ptr + row)
        weights = _weights(x_ptr + row * stride_n, offs_v, size, highest, temperature, least)
        tl.store(sums_ptr + row * S + tile, tl.sum(weights, axis=0))
    if TELLS:
        told = sound & (tl.load(told_ptr + row) != 0)
        if told:
            one = highest * 0.0 + 1.0
            weights = _weights(x_ptr + row * stride_n, offs_v, size, highest, one, float("-inf"))
            tl.store(wholes_ptr + row * S + tile, tl.sum(weights, axis=0))


@triton.jit
def _choose_kernel(
    x_ptr, temperature_ptr, least_ptr, points_ptr, told_ptr, tops_ptr, firsts_ptr, sums_ptr, wholes_ptr,
    tokens_ptr, best_ptr, margin_ptr, lse_ptr, stride_n, size,
    TELLS: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One program per row: the tile in which its point lies, and the token there.
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    highest, sound = _highest(tops_ptr, row, S, BLOCK_S)
    temperature = tl.load(temperature_ptr + row)
    tl.store(best_ptr + row, highest)
    if TELLS:
        told = sound & (tl.load(told_ptr + row) != 0)
        wholes = tl.load(wholes_ptr + row * S + offs_s, mask=mask_s, other=0.0)
        wholes = tl.where(told, wholes, 1.0)
        tl.store(lse_ptr + row, highest + tl.log(tl.sum(wholes, axis=0)))
    if sound & (temperature > 0.0):
        sums = tl.load(sums_ptr + row * S + offs_s, mask=mask_s, other=0.0)
        ends = tl.cumsum(sums, axis=0)
        total = tl.max(ends, axis=0)
        goal = tl.load(points_ptr + row) * total
        # The last tile with anything in it, where sums in another order end before the goal.
        tile = tl.min(tl.where((ends > goal) | (ends == total), offs_s, S - 1), axis=0)
        before = tl.sum(tl.where(offs_s < tile, sums, 0.0), axis=0)
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        least = tl.load(least_ptr + row)
        weights = _weights(x_ptr + row * stride_n, offs_v, size, highest, temperature, least)
        inside = tl.cumsum(weights, axis=0)
        passed = before + inside
        there = weights > 0.0
        beyond = there & (passed > goal)
        token = tl.min(tl.where(beyond, offs_v, size), axis=0)
        token = tl.where(token < size, token, tl.max(tl.where(there, offs_v, 0), axis=0))
        upper = tl.min(tl.where(beyond, passed, float("inf")), axis=0)
        lower = tl.max(tl.where(there & (passed <= goal), passed, before), axis=0)
        margin = tl.minimum(upper - goal, goal - lower) / total
        tl.store(tokens_ptr + row, token.to(tl.int64))
        tl.store(margin_ptr + row, tl.where(upper < float("inf"), tl.maximum(margin, 0.0), 0.0))
    else:
        tops = tl.load(tops_ptr + row * S + offs_s, mask=mask_s, other=float("-inf"))
        firsts = tl.load(firsts_ptr + row * S + offs_s, mask=mask_s, other=0)
        first = tl.min(tl.where(mask_s & (tops == highest), firsts, size - 1), axis=0)
        tl.store(tokens_ptr + row, tl.where(sound, first, 0))
        tl.store(margin_ptr + row, float("inf"))
