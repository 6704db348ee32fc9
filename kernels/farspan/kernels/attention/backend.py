"""One way to compute the contracts of contract.py and packed.py."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.kernels.attention.contract import Backward, Forward
from farspan.kernels.attention.packed import PackedBackward, PackedForward, backward_each, forward_each


@dataclass(frozen=True, slots=True)
class Backend:
    """Forward and backward of a pair, and of the documents of a packed sequence."""

    name: str
    forward: Forward
    backward: Backward
    packed_forward: PackedForward
    packed_backward: PackedBackward


def pairwise_backend(name: str, forward: Forward, backward: Backward) -> Backend:
    """A backend that computes packed documents one after another."""
    return Backend(name, forward, backward, forward_each(forward), backward_each(backward))
