"""Scores cut to the tokens that may be drawn: temperature, top-k, top-p, min-p, in plain torch.

N rows, S rows of one kind, V vocabulary.

Every cut is by value: tokens that tie with the last one kept are kept too, so that no row depends on the order in
which equal numbers are sorted, nor on the rows beside it.
Source: top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751), min-p (Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """What some rows ask for."""

    rows_S: Tensor
    values_S1: Tensor
    most: float


@dataclass(frozen=True, slots=True)
class Cuts:
    """What is asked for N rows, laid on the device of their scores once for as many steps as they stay the same."""

    temperature_N1: Tensor
    few: Part | None
    """top-k, where it is less than V."""
    nucleus: Part | None
    """top-p."""
    likely: Part | None
    """The log of min-p."""

    def apply(self, scores_NV: Tensor) -> Tensor:
        """Scores over temperature, the largest 0, and -inf where a token may not be drawn."""
        # The largest score becomes 0 first: a small temperature must not make it infinite.
        scores_NV = (scores_NV - scores_NV.amax(-1, keepdim=True)) / self.temperature_N1
        if self.few is not None:
            best_SK = scores_NV[self.few.rows_S].topk(int(self.few.most)).values
            _cut(scores_NV, self.few.rows_S, best_SK.gather(-1, self.few.values_S1 - 1))
        if self.nucleus is not None:
            rows_S = self.nucleus.rows_S
            _cut(scores_NV, rows_S, _nucleus_score(scores_NV[rows_S], self.nucleus.values_S1))
        if self.likely is not None:
            # The most likely token has score 0.
            _cut(scores_NV, self.likely.rows_S, self.likely.values_S1)
        return scores_NV


def _cut(scores_NV: Tensor, rows_S: Tensor, least_S1: Tensor) -> None:
    part_SV = scores_NV[rows_S]
    scores_NV[rows_S] = part_SV.masked_fill(part_SV < least_S1, -torch.inf)


def _nucleus_score(scores_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """Score of the least likely token of each nucleus: the one that crosses top_p still belongs to it."""
    probs_SV = scores_SV.softmax(-1)
    # All tokens less likely than this make up less than 1 - top_p together: they need not be sorted.
    floor_S1 = (1 - top_p_S1) / scores_SV.shape[-1]
    # The one place where drawing waits for the device: sorting everything would take longer.
    width = max(1, int((probs_SV > floor_S1).sum(-1).amax()))
    best_SK, order_SK = probs_SV.topk(width)
    before_SK = best_SK.cumsum(-1) - best_SK
    last_S1 = ((before_SK < top_p_S1).sum(-1, keepdim=True) - 1).clamp(min=0)
    return scores_SV.gather(-1, order_SK.gather(-1, last_S1))
