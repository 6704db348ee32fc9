"""What a test does with a weights engine on one rank of the pool."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.config.schema import RunConfig
from farspan.train.build import Training, build


def build_here(config: RunConfig, cache: str) -> Training:
    """The training of this rank, as in a process that a launcher has just started."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    if config.weights.engine == "deepspeed":
        _forget_counters()
    return build(config, torch.device("cpu"), Path(cache))


def whole_gradients(training: Training) -> dict[str, torch.Tensor]:
    """Every whole gradient after `backward`, of FSDP2 or ZeRO-3."""
    gradients = {}
    for name, weight in training.step.loss.named_parameters():
        if weight.requires_grad:
            gradients[name.removeprefix("model.")] = _whole_gradient(weight)
        else:
            assert weight.grad is None, f"{name} is frozen"
    return gradients


def _whole_gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(weight.grad, DTensor):
        return weight.grad.full_tensor()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(weight).clone()


def _forget_counters() -> None:
    """DeepSpeed numbers modules and weights per process; ranks that served other tests would not agree on them."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
