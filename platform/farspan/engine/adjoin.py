"""Weights of linear layers over the same rows, one behind the other in memory: one multiplication where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def lay_together(linears: Sequence[nn.Linear]) -> bool:
    """Move their weights, and their biases, into one piece: the layers stay what they are, and nothing is held twice.

    False, and nothing is moved: they do not fit together, or there is no room for a copy of them.
    """
    groups = [[linear.weight for linear in linears]]
    if any(linear.bias is not None for linear in linears):
        groups.append([linear.bias for linear in linears])
    if not all(_fit(group) for group in groups):
        return False
    try:
        joined = [torch.cat([each.detach() for each in group]) for group in groups]
    except torch.OutOfMemoryError:
        return False
    for group, whole in zip(groups, joined, strict=True):
        for each, part in zip(group, whole.split([len(each) for each in group]), strict=True):
            # The parameter stays the object that it is: whoever holds it sees what it saw.
            each.data = part
    return True


def _fit(weights: Sequence[Tensor | None]) -> bool:
    first = weights[0]
    return first is not None and all(
        each is not None
        and (each.dtype, each.device, each.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        and each.untyped_storage().nbytes() == each.nbytes
        for each in weights
    )
