"""Weights and gradients as one process has them."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_of(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, wherever its rows are. Collective where it is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
