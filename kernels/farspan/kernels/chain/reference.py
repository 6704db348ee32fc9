"""A chain of steps in plain torch, one by one, as modules of transformers compute them. Contract: contract.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from farspan.kernels.chain.contract import (
    Activation,
    Add,
    Chain,
    Gate,
    Multiply,
    Normalize,
    Rotate,
    Step,
    widths_of,
)
from farspan.kernels.linear.reference import bind_linear_reference
from farspan.kernels.rms_norm.reference import bind_rms_norm_reference


def bind_chain_reference(steps: Sequence[Step], given: Mapping[str, int], wanted: Sequence[str]) -> Chain:
    widths_of(steps, given)

    def chain_reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        rows = dict(zip(given, inputs, strict=True))
        for step in steps:
            rows[step.y] = _step(step, rows)
        return tuple(rows[name] for name in wanted)

    return chain_reference


def _step(step: Step, rows: Mapping[str, Tensor]) -> Tensor:
    match step:
        case Multiply():
            return bind_linear_reference(step.w_NK, step.b_N)(rows[step.x])
        case Normalize():
            x_TD = rows[step.x].unflatten(1, (-1, len(step.w_D)))
            return bind_rms_norm_reference(step.w_D, step.eps, step.kind)(x_TD).flatten(1)
        case Gate():
            return activate(rows[step.gate], step.activation) * rows[step.up]
        case Add():
            return rows[step.a] + rows[step.b]
        case Rotate():
            return _rotate(rows[step.x].unflatten(1, (-1, step.dim)), rows[step.cos], rows[step.sin]).flatten(1)


def activate(x: Tensor, activation: Activation) -> Tensor:
    if activation is Activation.SILU:
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    num_turned = cos_TR.shape[1]
    turned_THR, rest = x_THD[..., :num_turned], x_THD[..., num_turned:]
    first, second = turned_THR.chunk(2, -1)
    crossed_THR = torch.cat((-second, first), -1)
    return torch.cat((turned_THR * cos_TR[:, None] + crossed_THR * sin_TR[:, None], rest), -1)
