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

from farspan.engine.blocks import switch_blocks
from farspan.engine.norms import known_norm
from farspan.engine.turns import switch_turns
from farspan.kernels.linear.dispatch import choose_linear
from farspan.kernels.rms_norm.dispatch import choose_rms_norm
from farspan.kernels.sampling.dispatch import choose_sampling


def speed_up(model: PreTrainedModel) -> int:
    """Switch what has a faster kernel here; gives how many modules. The model trains no more."""
    head = model.get_output_embeddings()
    size = model.config.get_text_config(decoder=True).vocab_size if head is None else len(head.weight)
    # Compiled and tried out now, that no request waits: for logits, and for what biases and penalties make of them.
    for dtype in (model.dtype, torch.float32):
        choose_sampling(model.device.type, dtype, size)
    return _switch_linears(model) + _switch_norms(model) + switch_turns(model) + switch_blocks(model)


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
            # Or a residual of another type, or weights that were exchanged since.
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
        norm = known_norm(module, model.dtype, bind) if _has_own_forward(module) else None
        if norm is not None:
            own = bind(norm.weight_K, norm.eps, norm.kind)
            size = len(norm.weight_K)
            module.forward = _Switched(module, norm.weight_K, own, size, size)
            count += 1
    return count


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" not in module.__dict__
