"""Rows of logits of every kind that a model or a request makes of them, and what is asked of each."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.kernels.sampling.contract import Draws

TEMPERATURES = (0.0, 0.3, 1.0, 1.7, 1e-300)


def logits_of(rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Smooth, tied, steep, flat, and with most or all but one token forbidden, in turns."""
    generator = torch.Generator().manual_seed(seed)
    x_NV = 3 * torch.randn(rows, vocab_size, generator=generator)
    x_NV[1::6] = x_NV[1::6].round()
    x_NV[2::6] *= 40
    x_NV[3::6] = 0.5
    x_NV[4::6] = x_NV[4::6].masked_fill(torch.rand(x_NV[4::6].shape, generator=generator) < 0.9, -torch.inf)
    x_NV[5::6, 1:] = -torch.inf
    # Somebody is always allowed, and the last one as often as the first.
    x_NV[4::6, -1] = 1.0
    return x_NV.to(dtype)


def draws_of(rows: int, *, cuts: bool, device: str = "cpu") -> Draws:
    """Every temperature meets every kind of row and of cut."""
    number_N = torch.arange(rows)
    temperature_N = torch.tensor(TEMPERATURES, dtype=torch.float64)[number_N // 6 % 5]
    top_k_N = torch.tensor([0, 0, 1, 7, 0, 40, 10**9])[number_N % 7] * cuts
    top_p_N = torch.tensor([1.0, 0.9, 0.3, 1e-9, 0.9999, 1.0, 0.5, 1.0] if cuts else [1.0], dtype=torch.float64)
    min_p_N = torch.tensor([0.0, 0.0, 0.05, 0.0, 0.3, 0.0, 0.0, 1.0, 0.0, 0.0, 0.01], dtype=torch.float64)
    asked = (temperature_N, top_k_N, top_p_N[number_N % len(top_p_N)], min_p_N[number_N % 11].log())
    return Draws(*(x_N.to(device) for x_N in asked))


def points_of(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
