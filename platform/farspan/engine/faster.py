"""Modules of a model by farspan's kernels, where those are faster than torch's. For inference only.

A module is switched by its forward, after a trial on random rows: one whose own forward gives anything else, or rounds
elsewhere, keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.kernels.linear.dispatch import choose_linear
from farspan.kernels.rms_norm.contract import BindRmsNorm, Kind, RmsNorm
from farspan.kernels.rms_norm.dispatch import choose_rms_norm

# Largest difference of an element, as a part of it, and how many elements may differ at all: sums in another order.
_TOLERANCE = {torch.float32: (1e-5, 1.0), torch.bfloat16: (2**-7, 0.05)}
_EPS_NAMES = ("variance_epsilon", "eps")


def speed_up(model: PreTrainedModel) -> int:
    """Switch what has a faster kernel here; gives how many modules. The model trains no more."""
    return _switch_linears(model) + _switch_norms(model)


@dataclass(frozen=True, slots=True)
class _Switched:
    """A module's forward by a kernel that was bound to its weight, by the module itself for anything else."""

    module: nn.Module
    weight: Tensor
    rows: Callable[[Tensor], Tensor]
    num_inputs: int
    num_outputs: int

    def __call__(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.module.weight)
        if x.dtype != self.weight.dtype or weight.data_ptr() != self.weight.data_ptr():
            # A residual of another type, or weights that were exchanged since.
            return cast(Tensor, type(self.module).forward(self.module, x))
        return self.rows(x.reshape(-1, self.num_inputs)).view(*x.shape[:-1], self.num_outputs)


def _switch_linears(model: PreTrainedModel) -> int:
    bind, count = choose_linear(model.device.type, model.dtype), 0
    if bind is None:
        return 0
    for module in model.modules():
        # Subclasses compute something else.
        if type(module) is not nn.Linear or module.weight.dtype != model.dtype or not _has_own_forward(module):
            continue
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        own = bind(weight, bias)
        x_TK = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        # Some outputs are near zero, which sums in another order change by a large part of themselves.
        want, got = nn.functional.linear(x_TK, weight, bias).float(), own(x_TK).float()
        if float((got - want).norm()) <= 1e-2 * float(want.norm()):
            module.forward = _Switched(module, weight, own, module.in_features, module.out_features)  # type: ignore[assignment]
            count += 1
    return count


def _switch_norms(model: PreTrainedModel) -> int:
    bind, count = choose_rms_norm(model.device.type, model.dtype), 0
    if bind is None:
        return 0
    for module in model.modules():
        weight_K = _weight_of_norm(module, model.dtype)
        own = None if weight_K is None else _own_norm(module, weight_K, bind)
        if weight_K is not None and own is not None:
            module.forward = _Switched(module, weight_K, own, len(weight_K), len(weight_K))
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
    eps = next((float(getattr(module, name)) for name in _EPS_NAMES if getattr(module, name, None) is not None), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x_TK = (torch.randn(6, len(weight), generator=generator) * torch.logspace(-3, 2, 6)[:, None]).to(weight.dtype)
    with torch.inference_mode():
        want = module(x_TK)
        for kind in Kind:
            own = bind(weight, eps, kind)
            if _agree(own(x_TK), want):
                return own
    return None


def _agree(got: Tensor, want: Tensor) -> bool:
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    most, share = _TOLERANCE[want.dtype]
    got, want = got.double(), want.double()
    near = bool(((got - want).abs() <= most * want.abs() + 1e-30).all())
    return near and float((got != want).double().mean()) <= share


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" not in module.__dict__
