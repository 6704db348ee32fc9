"""A token for each row of logits: the contract every backend keeps.

Shapes: N rows, V vocabulary. Numbers are fp64, whatever the logits are.

A row of temperature 0 gets the first of its highest logits. In any other a token has

    score_V = (logit_V - highest) / temperature,    weight_V = exp(score_V),

0 where it is cut: by top-k, then top-p, then min-p (cuts.py). Drawn is the first token, in the order of the vocabulary,
up to which the weights make up more than `point` of all of them: the inverse of the cumulative distribution. A row's
token depends on its own logits and numbers alone. Where a logit is NaN or infinite it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Running sums of the same weights in any order are closer than this, as a part of all of them, for a million tokens.
SURE = 2.0**-32


@dataclass(frozen=True, slots=True)
class Draws:
    """What rows ask for, on the device of their logits."""

    temperature_N: Tensor
    top_k_N: Tensor
    """int64; 0: all."""
    top_p_N: Tensor
    """1: all."""
    least_N: Tensor
    """The log of min-p, a score: tokens under it are cut; -inf: none."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What came of it, on the same device."""

    tokens_N: Tensor
    """int64."""
    best_N: Tensor
    """The highest logit; NaN where any is, in the type of the logits or a wider one."""
    margin_N: Tensor
    """How far `point` is from where another token begins, as a part of all weights, and top-p from another cut: under
    `SURE` another order of summation may draw another token. inf: there is none to draw."""
    lse_N: Tensor | None
    """The log of the sum of exp(logit), where it was asked for; no temperature, nothing cut."""


class Sample(Protocol):
    def __call__(self, logits_NV: Tensor, draws: Draws, points_N: Tensor, told_N: Tensor | None = None) -> Chosen:
        """`points_N` in [0, 1). `told_N`, bool: whose lse is wanted; None: nobody's. Other rows of it mean nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """A backend."""

    sample: Sample
    cuts: bool
    """Whether it knows top-k and top-p; if not, all rows must have 0 and 1."""


def check_rows(logits_NV: Tensor, draws: Draws, points_N: Tensor, told_N: Tensor | None) -> None:
    """Assert the shapes and types of the contract: a wrong one is our bug, not a user's."""
    assert logits_NV.dtype in DTYPES, f"not written for {logits_NV.dtype}"
    floats = (draws.temperature_N, draws.top_p_N, draws.least_N, points_N)
    assert all(x_N.dtype == torch.float64 for x_N in floats), "numbers are fp64"
    assert draws.top_k_N.dtype == torch.int64, "top-k counts"
    given = (*floats, draws.top_k_N, *(() if told_N is None else (told_N,)))
    assert all(x_N.shape == logits_NV.shape[:1] and x_N.is_contiguous() for x_N in given), "one of each for each row"
    assert told_N is None or told_N.dtype == torch.bool, "told or not"
