"""Weights, gradients and optimizer states cut over every rank (FSDP2, torch's own `fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_weights(root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard `layers` one by one and the rest with `root`.

    Weights are kept in their own type and cast to `compute_dtype` where they are used; gradients are summed in fp32
    (or wider). They are summed, not averaged: the loss is already divided by the global number of labels.
    A single rank that uses weights as it keeps them is left as it is: there is nothing to cut, to cast or to sum.
    """
    if mesh.size() == 1 and all(weight.dtype == compute_dtype for weight in root.parameters()):
        return
    reduce_dtype = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without it the factor is applied by a collective that gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights, and forward and backward are no collectives: ranks run different numbers
    of them, in any order. Gradients add up on each rank until `sum_gradients`. Collective to enter.
    """
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield
        return
    assert isinstance(root, FSDPModule), "the root is sharded with its layers"
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_forward(False)
    root.set_reshard_after_backward(False)
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        root.set_requires_gradient_sync(True)
        root.set_reshard_after_backward(True)
        for module in sharded:
            # As `shard_weights` left it: the root's weights are used first in backward, so they stay after forward.
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()


def sum_gradients(root: nn.Module) -> None:
    """Inside `gathered`: the next backward, the same on every rank, sums over them what has added up.

    A single rank whose weights are not cut has nothing to sum.
    """
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(True)
