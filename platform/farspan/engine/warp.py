"""Scores cut to the tokens that may be drawn: temperature, top-k, top-p, min-p.

N rows, S rows of one kind, V vocabulary.

Every cut is by value: tokens that tie with the last one kept are kept too, so that no row depends on the order in
which equal numbers are sorted, nor on the rows beside it.
Source: top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751), min-p (Nguyen et al. 2024,
https://arxiv.org/abs/2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.engine.request import SamplingParams


def warp(scores_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores over temperature, -inf where a token may not be drawn. Temperatures must be above 0."""
    return Warp.of(params, scores_NV).apply(scores_NV)


@dataclass(frozen=True, slots=True)
class _Part:
    """What some rows ask for."""

    rows_S: Tensor
    values_S1: Tensor
    most: float


@dataclass(frozen=True, slots=True)
class Warp:
    """What is asked for N rows, laid on the device of their scores once for as many steps as they stay the same."""

    temperature_N1: Tensor
    few: _Part | None
    nucleus: _Part | None
    likely: _Part | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], like: Tensor) -> Warp:
        """For scores of the type, device and vocabulary of `like`."""
        vocab_size = like.shape[-1]
        return cls(
            send([[p.temperature] for p in params], like.dtype, like.device),
            _part([p.top_k if 0 < p.top_k < vocab_size else None for p in params], torch.long, like.device),
            _part([p.top_p if p.top_p < 1 else None for p in params], like.dtype, like.device),
            _part([p.min_p if p.min_p > 0 else None for p in params], like.dtype, like.device),
        )

    def apply(self, scores_NV: Tensor) -> Tensor:
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
            _cut(scores_NV, self.likely.rows_S, self.likely.values_S1.log())
        return scores_NV


def _part(asked: Sequence[float | None], dtype: torch.dtype, device: torch.device) -> _Part | None:
    there = [(row, value) for row, value in enumerate(asked) if value is not None]
    if not there:
        return None
    rows_S = send([row for row, _ in there], torch.long, device)
    return _Part(rows_S, send([[value] for _, value in there], dtype, device), max(value for _, value in there))


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


def send(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it computes."""
    here = torch.as_tensor(values, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
