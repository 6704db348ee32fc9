"""Angles by which a model turns queries and keys, by a kernel where that gives the same. For inference only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.kernels.rotary.contract import Angles, BindAngles
from farspan.kernels.rotary.dispatch import MOST_TOKENS, choose_angles

# The others have frequencies that follow the length of what was seen.
_FIXED = ("default", "linear", "llama3", "yarn")
# How many of the bf16 numbers may be rounded to the other side.
_ROUNDED = 0.05


@dataclass(frozen=True, slots=True)
class _Turns:
    """The forward of a module of angles."""

    module: nn.Module
    angles: Angles
    frequencies: Tensor

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        there = self.module._buffers.get("inv_freq") is self.frequencies
        fits = x.dtype == torch.bfloat16 and position_ids.shape[0] == 1 and position_ids.dtype == torch.int64
        if args or kwargs or not there or not fits or position_ids.shape[1] > MOST_TOKENS:
            forward = cast(Callable[..., tuple[Tensor, Tensor]], type(self.module).forward)
            return forward(self.module, x, position_ids, *args, **kwargs)
        cos_TD, sin_TD = self.angles(position_ids[0])
        return cos_TD[None], sin_TD[None]


def switch_turns(model: PreTrainedModel) -> int:
    """Switch the modules whose angles are those of the kernel; gives how many."""
    bind, count = choose_angles(model.device.type, model.dtype), 0
    if bind is None:
        return 0
    for module in model.modules():
        if (turns := _fitting(module, bind)) is not None:
            module.forward = turns
            count += 1
    return count


def _fitting(module: nn.Module, bind: BindAngles) -> _Turns | None:
    frequencies = module._buffers.get("inv_freq")
    scale, kind = getattr(module, "attention_scaling", None), getattr(module, "rope_type", None)
    if frequencies is None or frequencies.ndim != 1 or not isinstance(scale, float | int) or kind not in _FIXED:
        return None
    turns = _Turns(module, bind(frequencies.detach().float().contiguous(), float(scale)), frequencies)
    positions_1T = torch.tensor([[0, 1, 2, 31, 1000, 65_537, 1_000_003]])
    x_1TE = torch.zeros(*positions_1T.shape, 1, dtype=torch.bfloat16)
    with torch.inference_mode():
        try:
            own = module(x_1TE, positions_1T)
        except (TypeError, RuntimeError):
            # It asks for more.
            return None
        pairs = list(zip(turns(x_1TE, positions_1T), own, strict=False))
        return turns if len(own) == 2 and all(_agree(got, want) for got, want in pairs) else None


def _agree(got: Tensor, want: Any) -> bool:
    if not isinstance(want, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    off = (got.double() - want.double()).abs()
    return bool((off <= 2**-8 * want.double().abs() + 1e-6).all()) and float((off > 0).double().mean()) <= _ROUNDED
