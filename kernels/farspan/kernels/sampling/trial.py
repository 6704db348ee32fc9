"""Whether a backend chooses the tokens of the reference, and whether it takes less time for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from farspan.kernels.sampling.contract import SURE, Draws, Sample, Sampling
from farspan.kernels.sampling.reference import sample_reference

_ROWS, _VOCAB = 24, 4500
# The times of so many rows are compared, so often.
_TIMED_ROWS, _ROUNDS = (1, 8), 5


def agrees(sampling: Sampling, device: torch.device, dtype: torch.dtype) -> bool:
    """The same tokens and highest logits, greedy and drawn, with all that it knows to cut."""
    logits_NV, draws, points_N = _case(_ROWS, _VOCAB, device, dtype, cuts=sampling.cuts)
    told_N = points_N < 0.7
    want, got = (sample(logits_NV, draws, points_N, told_N) for sample in (sample_reference, sampling.sample))
    assert want.lse_N is not None, "it was asked for"
    near = got.lse_N is not None and bool(((got.lse_N - want.lse_N).abs() <= 1e-9)[told_N].all())
    same = bool(((got.tokens_N == want.tokens_N) | (want.margin_N < SURE)).all())
    return same and near and bool((got.best_N == want.best_N).all())


def is_faster(sampling: Sampling, device: torch.device, dtype: torch.dtype, vocab_size: int) -> bool:
    """For few rows and for some, where all are drawn and nothing is cut. Waits for the device."""
    return all(
        _seconds(sampling.sample, rows, vocab_size, device, dtype)
        < _seconds(sample_reference, rows, vocab_size, device, dtype)
        for rows in _TIMED_ROWS
    )


def _seconds(sample: Sample, rows: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> float:
    logits_NV, draws, points_N = _case(rows, vocab_size, device, dtype, cuts=False)
    draws.temperature_N.fill_(0.8)
    # Compiled now, too, for whoever wants a log-probability.
    sample(logits_NV, draws, points_N, points_N < 2)
    return min(_timed(lambda: sample(logits_NV, draws, points_N).tokens_N, device) for _ in range(_ROUNDS))


def _timed(run: Callable[[], Tensor], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    # Reading the tokens waits for them.
    run().tolist()
    return time.perf_counter() - began


def _case(
    rows: int, vocab_size: int, device: torch.device, dtype: torch.dtype, *, cuts: bool
) -> tuple[Tensor, Draws, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(rows, vocab_size, generator=generator)).to(device, dtype)
    number_N = torch.arange(rows, dtype=torch.float64)
    few_N, nucleus_N, likely_N = ((number_N % every == 1).double() for every in (4, 3, 5))
    temperature_N, top_p_N = number_N % 3 * 0.7, 1 - nucleus_N * 0.1 * cuts
    top_k_N, least_N = (few_N * 40 * cuts).long(), (likely_N * 0.02).log()
    points_N = torch.rand(rows, generator=generator, dtype=torch.float64)
    asked = (temperature_N, top_k_N, top_p_N, least_N)
    return logits_NV, Draws(*(x_N.to(device) for x_N in asked)), points_N.to(device)
