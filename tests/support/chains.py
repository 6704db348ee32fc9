"""Chains of steps like those of a decoder layer, in odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate, Step
from farspan.kernels.rms_norm.contract import Kind

WIDTH, HEADS, DIM, INNER = 51, 3, 16, 70
GIVEN = {"x": WIDTH, "cos": 8, "sin": 8}
WANTED = ["turned", "whole", "y"]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).bfloat16()


def block(kind: Kind, activation: Activation) -> list[Step]:
    """Everything a decoder layer does beside attention."""
    return [
        Normalize("x", "n", draw(WIDTH), 1e-6, kind),
        Multiply("n", "q", draw(HEADS * DIM, WIDTH), draw(HEADS * DIM)),
        Multiply("n", "v", draw(2 * DIM, WIDTH, seed=1)),
        Normalize("q", "q_normed", draw(DIM), 1e-5, kind),
        Rotate("q_normed", "cos", "sin", "turned", DIM),
        Multiply("turned", "o", draw(WIDTH, HEADS * DIM, seed=2)),
        Add("x", "o", "whole"),
        Normalize("whole", "m", draw(WIDTH, seed=3), 1e-6, kind),
        Multiply("m", "gate", draw(INNER, WIDTH, seed=4)),
        Multiply("m", "up", draw(INNER, WIDTH, seed=5)),
        Gate("gate", "up", "inner", activation),
        Multiply("inner", "down", draw(WIDTH, INNER, seed=6)),
        Add("whole", "down", "y"),
    ]


def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    angles = draw(count, 4, seed=7).float().repeat(1, 2)
    return draw(count, WIDTH, seed=8), angles.cos().bfloat16(), angles.sin().bfloat16()


def wide(steps: Sequence[Step]) -> list[Step]:
    """The same in double precision."""
    return with_weights(steps, torch.float64)


def with_weights(steps: Sequence[Step], place: torch.dtype | str) -> list[Step]:
    """The same with weights of another type, or on another device."""
    return [
        type(step)(*(x.to(place) if isinstance(x, Tensor) else x for x in (getattr(step, n) for n in step.__slots__)))
        for step in steps
    ]


def laid_together(steps: Sequence[Step]) -> list[Step]:
    """The same with the weights of linear layers over the same rows in one piece."""
    done: list[Step] = []
    for x, group in groupby(steps, key=lambda step: step.x if isinstance(step, Multiply) else None):
        same = list(group)
        if x is None:
            done += same
            continue
        layers = [step for step in same if isinstance(step, Multiply)]
        weights = torch.cat([layer.w_NK for layer in layers]).split([len(layer.w_NK) for layer in layers])
        done += [replace(layer, w_NK=weight) for layer, weight in zip(layers, weights, strict=True)]
    return done
