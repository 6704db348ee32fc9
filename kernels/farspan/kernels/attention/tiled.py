"""Partial attention in plain torch by tiles: for what no fused kernel computes (soft caps on CPU).

Scores are held for one tile of queries and keys at a time, whatever the lengths. Contract and letters: contract.py;
N query heads per key/value head (H = G * N). Tiles are laid out [G, N * T, ...]: the query heads that share keys are
rows of one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.attention.contract import check_pair

# Scores of one tile, in elements over all heads: 16 MiB of fp32 stays near the cores.
_TILE_ELEMENTS = 4 * 1024 * 1024
_MAX_QUERIES = 256


@dataclass(frozen=True, slots=True)
class _Rule:
    """What the softmax sees of a pair."""

    scale: float
    offset: int | None
    window: int | None
    softcap: float | None

    def keys(self, queries: range, num_keys: int) -> range:
        """The keys that any of these queries sees."""
        if self.offset is None:
            return range(num_keys)
        first = 0 if self.window is None else max(0, queries.start + self.offset - self.window + 1)
        return range(first, min(num_keys, queries.stop + self.offset))

    def hides(self, queries: range, keys: range) -> bool:
        """Whether some query of the tile does not see some key of it."""
        if self.offset is None:
            return False
        ahead = keys.stop - 1 > queries.start + self.offset
        behind = self.window is not None and keys.start <= queries.stop - 1 + self.offset - self.window
        return ahead or behind


def attend_tiled(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGC: Tensor,
    *,
    scale: float,
    offset: int | None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    rule, wide = _Rule(scale, offset, window, softcap), _wide(q_THD)
    num_tokens, num_heads, _ = q_THD.shape
    num_groups = k_SGD.shape[1]
    out_THC = torch.zeros(num_tokens, num_heads, v_SGC.shape[2], dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.full((num_tokens, num_heads), float("-inf"), dtype=wide, device=q_THD.device)
    for queries, tiles in _tiles(num_tokens, k_SGD.shape[0], num_heads, rule):
        rows = slice(queries.start, queries.stop)
        q_GXD = _by_group(q_THD[rows], num_groups)
        out_GXC = q_GXD.new_zeros(*q_GXD.shape[:2], v_SGC.shape[2])
        top_GX1 = q_GXD.new_full((*q_GXD.shape[:2], 1), float("-inf"))
        total_GX1 = torch.zeros_like(top_GX1)
        for keys in tiles:
            here = slice(keys.start, keys.stop)
            scores_GXS, _ = _scores(q_GXD, k_SGD[here], queries, keys, rule)
            higher_GX1 = torch.maximum(top_GX1, scores_GXS.amax(-1, keepdim=True))
            # A query that has seen no key yet keeps weights of zero, not NaN.
            pivot_GX1 = higher_GX1.masked_fill(higher_GX1.isneginf(), 0.0)
            probs_GXS = scores_GXS.sub_(pivot_GX1).exp_()
            rescale_GX1 = (top_GX1 - pivot_GX1).exp_()
            total_GX1 = total_GX1 * rescale_GX1 + probs_GXS.sum(-1, keepdim=True)
            out_GXC.mul_(rescale_GX1).baddbmm_(probs_GXS, v_SGC[here].transpose(0, 1).to(wide))
            top_GX1 = higher_GX1
        out_GXC.div_(total_GX1.masked_fill(total_GX1 == 0.0, 1.0))
        out_THC[rows] = _packed(out_GXC, num_heads)
        lse_TH[rows] = _packed(top_GX1 + total_GX1.log(), num_heads).squeeze(-1)
    return out_THC, lse_TH


def attend_tiled_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(q_THD, k_SGD, v_SGC, offset, window)
    rule, wide = _Rule(scale, offset, window, softcap), _wide(q_THD)
    num_tokens, num_heads, _ = q_THD.shape
    num_groups = k_SGD.shape[1]
    dq_THD = torch.zeros_like(q_THD)
    dk_GSD = torch.zeros_like(k_SGD.transpose(0, 1), dtype=wide, memory_format=torch.contiguous_format)
    dv_GSC = torch.zeros_like(v_SGC.transpose(0, 1), dtype=wide, memory_format=torch.contiguous_format)
    for queries, tiles in _tiles(num_tokens, k_SGD.shape[0], num_heads, rule):
        rows = slice(queries.start, queries.stop)
        q_GXD, dout_GXC, out_GXC = (_by_group(x[rows], num_groups) for x in (q_THD, dout_THC, out_THC))
        lse_GX1 = _by_group(lse_TH[rows].unsqueeze(-1), num_groups)
        lse_GX1 = lse_GX1.masked_fill(lse_GX1.isneginf(), 0.0)
        delta_GX1 = (dout_GXC * out_GXC).sum(-1, keepdim=True)
        dq_GXD = torch.zeros_like(q_GXD)
        for keys in tiles:
            here = slice(keys.start, keys.stop)
            scores_GXS, slope_GXS = _scores(q_GXD, k_SGD[here], queries, keys, rule)
            probs_GXS = scores_GXS.sub_(lse_GX1).exp_()
            dv_GSC[:, here].baddbmm_(probs_GXS.transpose(1, 2), dout_GXC)
            dscores_GXS = torch.bmm(dout_GXC, v_SGC[here].permute(1, 2, 0).to(wide))
            dscores_GXS.sub_(delta_GX1).mul_(probs_GXS).mul_(scale)
            if slope_GXS is not None:
                dscores_GXS.mul_(slope_GXS)
            dq_GXD.baddbmm_(dscores_GXS, k_SGD[here].transpose(0, 1).to(wide))
            dk_GSD[:, here].baddbmm_(dscores_GXS.transpose(1, 2), q_GXD)
        dq_THD[rows] = _packed(dq_GXD, num_heads)
    return dq_THD, dk_GSD.transpose(0, 1).to(k_SGD.dtype), dv_GSC.transpose(0, 1).to(v_SGC.dtype)


def _tiles(num_tokens: int, num_keys: int, num_heads: int, rule: _Rule) -> Iterator[tuple[range, list[range]]]:
    """Tiles of queries, each with the tiles of keys it looks at; queries that see no key are left out."""
    queries_per_tile = max(1, min(_MAX_QUERIES, num_tokens))
    keys_per_tile = max(64, _TILE_ELEMENTS // (num_heads * queries_per_tile))
    for start in range(0, num_tokens, queries_per_tile):
        queries = range(start, min(start + queries_per_tile, num_tokens))
        keys = rule.keys(queries, num_keys)
        tiles = [range(a, min(a + keys_per_tile, keys.stop)) for a in range(keys.start, keys.stop, keys_per_tile)]
        if tiles:
            yield queries, tiles


def _scores(q_GXD: Tensor, k_SGD: Tensor, queries: range, keys: range, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """(scores as the softmax sees them, derivative of the soft cap at each or None)."""
    scores_GXS = torch.bmm(q_GXD, k_SGD.permute(1, 2, 0).to(q_GXD.dtype)).mul_(rule.scale)
    slope_GXS = None
    if rule.softcap is not None:
        bent_GXS = scores_GXS.div_(rule.softcap).tanh_()
        slope_GXS = 1 - bent_GXS * bent_GXS
        scores_GXS = bent_GXS.mul_(rule.softcap)
    if rule.hides(queries, keys):
        assert rule.offset is not None
        at_T1 = torch.arange(queries.start, queries.stop, device=q_GXD.device)[:, None] + rule.offset
        behind_TS = at_T1 - torch.arange(keys.start, keys.stop, device=q_GXD.device)
        hidden_TS = behind_TS < 0 if rule.window is None else (behind_TS < 0) | (behind_TS >= rule.window)
        scores_GXS.unflatten(1, (-1, len(queries))).masked_fill_(hidden_TS, float("-inf"))
    return scores_GXS, slope_GXS


def _by_group(x_THD: Tensor, num_groups: int) -> Tensor:
    """[T, H, D] -> [G, N * T, D] in fp32 or wider."""
    return x_THD.to(_wide(x_THD)).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _packed(x_GXD: Tensor, num_heads: int) -> Tensor:
    """[G, N * T, D] -> [T, H, D]."""
    return x_GXD.unflatten(1, (num_heads // x_GXD.shape[0], -1)).flatten(0, 1).transpose(0, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
