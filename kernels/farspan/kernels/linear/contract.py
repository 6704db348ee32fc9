"""A linear layer on few or many rows: the contract every backend keeps.

Shapes: T rows, K inputs, N outputs.

    y_TN = x_TK w_NK^T + b_N, in the type of x; x, w and b have one type, sums are at least fp32.

An output of a row does not depend on how many rows there are, nor on what they hold.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """One layer."""

    def __call__(self, x_TK: Tensor) -> Tensor: ...


class BindLinear(Protocol):
    """A layer of weights and bias, which stay where they are as long as it is used."""

    def __call__(self, w_NK: Tensor, b_N: Tensor | None) -> Linear: ...


def check_linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> None:
    """Assert the shapes of the contract: a wrong one is our bug, not a user's."""
    assert x_TK.ndim == w_NK.ndim == 2, "rows of inputs, outputs of weights"
    assert x_TK.shape[1] == w_NK.shape[1], "inputs and weights disagree"
    assert x_TK.dtype == w_NK.dtype, "one type for inputs and weights"
    assert b_N is None or (b_N.shape == w_NK.shape[:1] and b_N.dtype == w_NK.dtype), "one bias for each output"
