"""Root-mean-square normalization of rows: the contract every backend keeps.

Shapes: T rows, K values of a row; x, w and y have one type. With n_TK = x_TK / sqrt(mean over K of x^2 + eps),
computed in at least fp32:

    SCALED    y_TK = w_K * n_TK, n rounded to the type of x before it is multiplied (Llama)
    ONE_MORE  y_TK = (1 + w_K) * n_TK, rounded to the type of x at the end (Gemma)

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; the roundings are those of transformers.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from torch import Tensor


class Kind(IntEnum):
    SCALED = 0
    ONE_MORE = 1


class RmsNorm(Protocol):
    """One layer, of one weight, kind and eps."""

    def __call__(self, x_TK: Tensor) -> Tensor: ...


class BindRmsNorm(Protocol):
    """A layer whose weight stays where it is as long as it is used."""

    def __call__(self, w_K: Tensor, eps: float, kind: Kind) -> RmsNorm: ...
