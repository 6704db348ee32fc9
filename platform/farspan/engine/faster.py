"""Modules of a model by farspan's kernels, where those are faster than torch's. For inference only.

A module is switched by its forward, after a trial: one whose own forward gives anything else keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.kernels.linear.dispatch import choose_linear
from farspan.kernels.rms_norm.contract import BindRmsNorm, Kind, RmsNorm
from farspan.kernels.rms_norm.dispatch import choose_rms_norm

Rows = Callable[[Tensor], Tensor]
# Largest difference of a result, as a part of its largest value: a few roundings of the type.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
_EPS_NAMES = ("variance_epsilon", "eps")


def speed_up(model: PreTrainedModel) -> int:
    """Switch what has a faster kernel here; gives how many modules. The model trains no more, and its weights stay."""
    return _switch_linears(model) + _switch_norms(model)


def _switch_linears(model: PreTrainedModel) -> int:
    bind = choose_linear(model.device.type, model.dtype)
    if bind is None:
        return 0
    # Subclasses compute something else.
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    switched = [module for module in plain if module.weight.dtype == model.dtype and _has_own_forward(module)]
    for module in switched:
        own = bind(module.weight.detach(), None if module.bias is None else module.bias.detach())
        _set_forward(module, own, module.in_features)
    return len(switched)


def _switch_norms(model: PreTrainedModel) -> int:
    bind, count = choose_rms_norm(model.device.type, model.dtype), 0
    if bind is None:
        return 0
    for module in model.modules():
        weight_K = _weight_of_norm(module, model.dtype)
        found = None if weight_K is None else _own_norm(module, weight_K, bind)
        if weight_K is not None and found is not None:
            _set_forward(module, found, len(weight_K))
            count += 1
    return count


def _weight_of_norm(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The one weight of a module that is a normalization by its name."""
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or len(module._parameters) != 1 or weight is None:
        return None
    fits = (weight.ndim, weight.dtype) == (1, dtype) and _has_own_forward(module)
    return weight.detach() if fits else None


def _own_norm(module: nn.Module, weight: Tensor, bind: BindRmsNorm) -> RmsNorm | None:
    """The kernel that gives what the module gives, on values as different as a model's."""
    eps = next((float(getattr(module, name)) for name in _EPS_NAMES if hasattr(module, name)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x_TK = (torch.randn(6, len(weight), generator=generator) * torch.logspace(-3, 2, 6)[:, None]).to(weight.dtype)
    with torch.inference_mode():
        want = module(x_TK)
        for kind in Kind:
            found = bind(weight, eps, kind)
            if _differ(found(x_TK), want) <= _TOLERANCE[weight.dtype]:
                return found
    return None


def _differ(got: Tensor, want: Tensor) -> float:
    if got.dtype != want.dtype or got.shape != want.shape:
        return float("inf")
    scale = want.double().abs().amax(1).clamp_min(1e-30)
    return float(((got.double() - want.double()).abs().amax(1) / scale).max())


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" not in module.__dict__


def _set_forward(module: nn.Module, rows: Rows, size: int) -> None:
    module.forward = partial(_by_rows, rows, size)


def _by_rows(rows: Rows, size: int, x: Tensor) -> Tensor:
    return rows(x.reshape(-1, size)).view(*x.shape[:-1], -1)
