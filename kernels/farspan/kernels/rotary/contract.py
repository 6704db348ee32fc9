"""Angles of rotary positions: the contract every backend keeps.

Shapes: T tokens, F frequencies of a head, D = 2 F.

    cos_TD, sin_TD: of position times frequency, in fp32, times `scale`, rounded to bf16; both halves of D alike.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; halves and roundings are those of transformers' Llama.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Angles(Protocol):
    """Of the frequencies of one model."""

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]: ...


class BindAngles(Protocol):
    """Angles of frequencies (fp32) that stay as they are."""

    def __call__(self, inv_freq_F: Tensor, scale: float) -> Angles: ...
