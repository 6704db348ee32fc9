"""Scores cut to the tokens that may be drawn: temperature, top-k, top-p, min-p.

N rows, S rows of one kind, V vocabulary.

Every cut is by value: tokens that tie with the last one kept are kept too, so that no row depends on the order in
which equal numbers are sorted, nor on the rows beside it.
Source: top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751), min-p (Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farspan.engine.request import SamplingParams


def warp(scores_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores over temperature, -inf where a token may not be drawn. Temperatures must be above 0."""
    temperature_N1 = _column(scores_NV, [p.temperature for p in params])
    # The largest score becomes 0 first: a small temperature must not make it infinite.
    scores_NV = (scores_NV - scores_NV.amax(-1, keepdim=True)) / temperature_N1
    vocab_size = scores_NV.shape[-1]
    few = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1]
    likely = [i for i, p in enumerate(params) if p.min_p > 0]
    if few:
        _cut(scores_NV, few, _kth_score(scores_NV[few], [params[i].top_k for i in few]))
    if nucleus:
        _cut(scores_NV, nucleus, _nucleus_score(scores_NV[nucleus], [params[i].top_p for i in nucleus]))
    if likely:
        # The most likely token has score 0.
        _cut(scores_NV, likely, _column(scores_NV, [params[i].min_p for i in likely]).log())
    return scores_NV


def _cut(scores_NV: Tensor, index: Sequence[int], least_S1: Tensor) -> None:
    part_SV = scores_NV[index]
    scores_NV[index] = part_SV.masked_fill(part_SV < least_S1, -torch.inf)


def _kth_score(scores_SV: Tensor, top_k: Sequence[int]) -> Tensor:
    best_SK = scores_SV.topk(max(top_k)).values
    return best_SK.gather(-1, torch.tensor(top_k, device=scores_SV.device)[:, None] - 1)


def _nucleus_score(scores_SV: Tensor, top_p: Sequence[float]) -> Tensor:
    """Score of the least likely token of each nucleus: the one that crosses top_p still belongs to it."""
    top_p_S1 = _column(scores_SV, top_p)
    probs_SV = scores_SV.softmax(-1)
    # All tokens less likely than this make up less than 1 - top_p together: they need not be sorted.
    floor_S1 = (1 - top_p_S1) / scores_SV.shape[-1]
    width = max(1, int((probs_SV > floor_S1).sum(-1).amax()))
    best_SK, order_SK = probs_SV.topk(width)
    before_SK = best_SK.cumsum(-1) - best_SK
    last_S1 = ((before_SK < top_p_S1).sum(-1, keepdim=True) - 1).clamp(min=0)
    return scores_SV.gather(-1, order_SK.gather(-1, last_S1))


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
