"""The optimizer a run asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farspan.errors import ConfigError
from farspan.memory.host import DramTier
from farspan.memory.inplace import InPlaceTier
from farspan.optim.adamw8bit import AdamW8bit
from farspan.optim.host import HostOptimizer, needed_bytes
from farspan.optim.shards import local_of

KINDS = ("adamw", "adamw8bit")
PLACES = ("none", "cpu")


class AdamSettings(Protocol):
    """What an optimizer takes from `OptimConfig`."""

    lr: float
    beta1: float
    beta2: float


def make_optimizer(
    groups: list[dict[str, Any]],
    optim: AdamSettings,
    *,
    kind: str = "adamw",
    offload: str = "none",
    tier: InPlaceTier | None = None,
    num_threads: int = 2,
) -> torch.optim.Optimizer:
    """AdamW over `groups` (lists of weights, each with its `weight_decay`), whole or cut by FSDP2.

    `kind`: adamw (fp32 moments) or adamw8bit. `offload`: none, or cpu, which keeps everything but the device's weights
    in `tier` (local DRAM; none: a tier of its own, exactly large enough). Clip with `clip_grad_norm`.

    Raises:
        ConfigError: an unknown kind or place, or weights this kind cannot step.
    """
    if kind not in KINDS:
        raise ConfigError("optim.kind", f"must be one of {', '.join(KINDS)}", kind, "use adamw")
    if offload not in PLACES:
        raise ConfigError(
            "weights.offload_optimizer", f"must be one of {', '.join(PLACES)}", offload, "use none or cpu"
        )

    def make(some: list[dict[str, Any]]) -> torch.optim.Optimizer:
        betas = (optim.beta1, optim.beta2)
        if kind == "adamw8bit":
            return AdamW8bit(some, lr=optim.lr, betas=betas)
        # One pass over weights and states instead of ten; on the CPU, too.
        return torch.optim.AdamW(some, lr=optim.lr, betas=betas, fused=True)

    if offload == "none":
        return make(groups)
    groups = [
        {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), **group, "params": list(group["params"])}
        for group in groups
    ]
    weights = [weight for group in groups for weight in group["params"]]
    # bitsandbytes' quantization on the CPU, itself threaded, gives wrong codes when two threads call it at once.
    threads = 1 if kind == "adamw8bit" else num_threads
    return HostOptimizer(groups, make, tier or _fitting(weights, kind), num_threads=threads)


def clip_grad_norm(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, wherever they are, to a global L2 norm of at most `max_norm`; gives the norm before, whole."""
    if isinstance(optimizer, HostOptimizer):
        return optimizer.clip_grad_norm(weights, max_norm)
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What this rank's optimizer states take."""
    states = cast(Iterable[Any], optimizer.state.values())
    values = [local_of(v) for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in values)


def _fitting(weights: list[nn.Parameter], kind: str) -> DramTier:
    """Room for masters, moments, gradients and, with several passes, the next gradients."""
    device = weights[0].device if weights else torch.device("cpu")
    nbytes = needed_bytes([local_of(weight) for weight in weights], 1, kind, adds=True)
    return DramTier(nbytes, device=device, name="dram (optimizer)")
