"""What this rank holds of a weight, whole or cut by FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def like_shard(local: Tensor, weight: Tensor) -> Tensor:
    """`local`, which belongs to this rank's rows of `weight`, as a tensor cut the way the weight is."""
    if not isinstance(weight, DTensor) or local.ndim == 0:
        return local
    shape = torch.Size((weight.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)
