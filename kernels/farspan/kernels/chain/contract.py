"""A chain of small steps over the same rows in one call: the contract every backend keeps.

Shapes: T rows, N outputs and K inputs of a linear layer, H heads of D numbers, R <= D of them rotated.

A step reads rows that are given or that an earlier step makes, and makes rows of its own under a name. All numbers are
bf16, sums are at least fp32, and what a step makes is rounded to bf16 as a module of transformers rounds it: a chain
gives what its steps give one by one. A row does not depend on how many rows there are, nor on what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from farspan.kernels.rms_norm.contract import Kind


class Activation(IntEnum):
    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True)
class Multiply:
    """y_TN = x_TK w_NK^T + b_N"""

    x: str
    y: str
    w_NK: Tensor
    b_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Normalize:
    """Every head of x, as wide as the weight, as in rms_norm/contract.py."""

    x: str
    y: str
    w_D: Tensor
    eps: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Gate:
    """y = activation(gate) * up, the activation rounded before it is multiplied."""

    gate: str
    up: str
    y: str
    activation: Activation


@dataclass(frozen=True, slots=True)
class Add:
    """y = a + b"""

    a: str
    b: str
    y: str


@dataclass(frozen=True, slots=True)
class Rotate:
    """The first R numbers of every head of `dim` turn by R/2 angles, place i with i + R/2; the others stay.

    y = x * cos + (-second half, first half) * sin, each product and the sum rounded.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """

    x: str
    cos: str
    sin: str
    y: str
    dim: int


Step: TypeAlias = Multiply | Normalize | Gate | Add | Rotate


class Chain(Protocol):
    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What was asked for, each [T, its width], made of the given rows in the order they were named."""
        ...


class BindChain(Protocol):
    def __call__(self, steps: Sequence[Step], given: Mapping[str, int], wanted: Sequence[str]) -> Chain:
        """Steps over `given` names and widths. Weights stay where they are as long as the chain is used."""
        ...


def reads(step: Step) -> tuple[str, ...]:
    """The rows that a step needs."""
    match step:
        case Multiply() | Normalize():
            return (step.x,)
        case Gate():
            return (step.gate, step.up)
        case Add():
            return (step.a, step.b)
        case Rotate():
            return (step.x, step.cos, step.sin)


def widths_of(steps: Sequence[Step], given: Mapping[str, int]) -> dict[str, int]:
    """How wide all rows are. Asserts that the steps fit together: what does not is our bug, not a user's."""
    widths = dict(given)
    for step in steps:
        sizes = [widths[name] for name in reads(step)]
        assert step.y not in widths, "a name is given once"
        widths[step.y] = sizes[0]
        match step:
            case Multiply():
                assert step.w_NK.shape[1] == sizes[0], "inputs and weights disagree"
                assert step.b_N is None or step.b_N.shape == step.w_NK.shape[:1], "one bias for each output"
                widths[step.y] = step.w_NK.shape[0]
            case Normalize():
                assert sizes[0] % len(step.w_D) == 0, "whole heads"
            case Gate() | Add():
                assert sizes[0] == sizes[1], "two of one width"
            case Rotate():
                assert sizes[0] % step.dim == 0, "whole heads"
                assert sizes[1] == sizes[2] <= step.dim, "an angle for each place"
                assert sizes[1] % 2 == 0, "places turn by pairs"
    return widths


def check_weights(step: Step, dtype: torch.dtype = torch.bfloat16) -> None:
    """Assert that a kernel can read the weights of a step."""
    for weight in (getattr(step, name, None) for name in ("w_NK", "b_N", "w_D")):
        if weight is not None:
            assert weight.dtype == dtype, f"not compiled for {weight.dtype}"
            assert weight.stride(-1) == 1 or weight.shape[-1] == 1, "weights of an output lie side by side"
