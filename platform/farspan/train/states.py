"""Sharded optimizer states as whole tensors on rank 0, and back onto any number of ranks. Every call is collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from farspan.optim.host import HostOptimizer
from farspan.optim.shards import like_shard, local_of


def gather_states(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<weight>/<state>` -> whole tensor on the CPU of rank 0; other ranks get nothing.

    One tensor travels at a time.
    """
    first = dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        for key, value in optimizer.state[weight].items():
            tensor = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                # A copy: what is written later must not change with the next step.
                whole[f"{name}/{key}"] = tensor.detach().to("cpu", copy=True)
    return whole


def scatter_states(module: nn.Module, optimizer: torch.optim.Optimizer, whole: Mapping[str, Tensor]) -> None:
    """Put what `gather_states` gave (read on rank 0) into the optimizer, each rank keeping its shard."""
    names: list[Any] = [sorted(whole)]
    dist.broadcast_object_list(names, src=0)
    weights = dict(module.named_parameters())
    for full_name in names[0]:
        name, _, key = full_name.rpartition("/")
        weight = weights[name]
        optimizer.state[weight][key] = _for_step(_received(whole.get(full_name), weight), weight, optimizer)


def local_shards(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What this rank holds: `weights/<weight>` and `states/<weight>/<state>`. Not collective, nothing is copied."""
    shards: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        shards[f"weights/{name}"] = local_of(weight)
        states = optimizer.held(weight) if isinstance(optimizer, HostOptimizer) else optimizer.state.get(weight, {})
        for key, value in states.items():
            shards[f"states/{name}/{key}"] = local_of(value)
    return shards


def load_local_shards(module: nn.Module, optimizer: torch.optim.Optimizer, shards: Mapping[str, Tensor]) -> None:
    """Put what `local_shards` gave on this rank back, on the same number of ranks. Not collective."""
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for full_name, tensor in shards.items():
            kind, _, rest = full_name.partition("/")
            if kind == "weights":
                local_of(weights[rest]).copy_(tensor)
                continue
            name, _, key = rest.rpartition("/")
            weight = weights[name]
            placed = tensor.to(weight.device) if tensor.ndim else _for_step(tensor, weight, optimizer)
            optimizer.state[weight][key] = like_shard(placed, weight)


def scatter_weights(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Put whole weights (read on rank 0) into the trained ones of `module`, each rank keeping its shard."""
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            with torch.no_grad():
                weight.copy_(_received(whole.get(name), weight))


def _for_step(value: Tensor, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """A state where the optimizer looks for it: a fused one counts its steps on the device, the others on the host."""
    return value.to(weight.device) if value.ndim == 0 and optimizer.defaults.get("fused") else value


def _received(tensor: Tensor | None, weight: nn.Parameter) -> Tensor:
    """One state on this rank: cut by rows like its weight, or, for the scalar step count, the same everywhere."""
    shape: list[Any] = [None if tensor is None else (tuple(tensor.shape), tensor.dtype)]
    dist.broadcast_object_list(shape, src=0)
    size, dtype = shape[0]
    # Scales of 8-bit states have the rows of their weight, and fewer columns.
    if isinstance(weight, DTensor) and size[:1] == tuple(weight.shape[:1]):
        full = torch.empty(size, dtype=dtype) if tensor is None else tensor
        return distribute_tensor(full.to(weight.device), weight.device_mesh, weight.placements)
    values: list[Any] = [tensor]
    dist.broadcast_object_list(values, src=0)
    return torch.as_tensor(values[0], dtype=dtype)
