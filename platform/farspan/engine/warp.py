"""What requests ask of the choice of their tokens, laid on the device of their logits. N rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farspan.engine.request import SamplingParams
from farspan.kernels.sampling.contract import Draws
from farspan.kernels.sampling.cuts import Cuts, Part


def warp(scores_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores over temperature, -inf where a token may not be drawn. Temperatures must be above 0."""
    return cuts_of(params, scores_NV).apply(scores_NV)


def cuts_of(params: Sequence[SamplingParams], like: Tensor) -> Cuts:
    """For scores of the type, device and vocabulary of `like`, by torch."""
    vocab_size = like.shape[-1]
    return Cuts(
        send([[p.temperature] for p in params], like.dtype, like.device),
        _part([p.top_k if 0 < p.top_k < vocab_size else None for p in params], torch.long, like.device),
        _part([p.top_p if p.top_p < 1 else None for p in params], like.dtype, like.device),
        _part([_least_score(p) if p.min_p > 0 else None for p in params], like.dtype, like.device),
    )


def draws_of(params: Sequence[SamplingParams], device: torch.device) -> Draws:
    """The same for a kernel."""
    floats = [[p.temperature for p in params], [p.top_p for p in params], [_least_score(p) for p in params]]
    temperature_N, top_p_N, least_N = send(floats, torch.float64, device)
    # More than any vocabulary has is all of it; as an int64 it must be one.
    top_k_N = send([min(p.top_k, 2**62) for p in params], torch.long, device)
    return Draws(temperature_N, top_k_N, top_p_N, least_N)


def _least_score(params: SamplingParams) -> float:
    return math.log(params.min_p) if params.min_p > 0 else -math.inf


def _part(asked: Sequence[float | None], dtype: torch.dtype, device: torch.device) -> Part | None:
    there = [(row, value) for row, value in enumerate(asked) if value is not None]
    if not there:
        return None
    rows_S = send([row for row, _ in there], torch.long, device)
    return Part(rows_S, send([[value] for _, value in there], dtype, device), max(value for _, value in there))


def send(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, without waiting for what it computes."""
    here = torch.as_tensor(values, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
