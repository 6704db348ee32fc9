"""What sharing a sequence costs one layer, in bytes for each token a rank holds. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sharing:
    """One strategy for one attention: bytes sent by a rank for each of its tokens, and what they need meanwhile."""

    near_forward: float = 0.0
    """By exchanging heads among `num_near` neighbours."""
    near_backward: float = 0.0
    far_forward: float = 0.0
    """By passing keys or queries on among all ranks."""
    far_backward: float = 0.0
    num_near: int = 1
    q_factor: float = 1.0
    """Query heads that are computed, padding included, for each real one."""
    kv_factor: float = 1.0
    stages: int = 1
    """Parts a head exchange is cut into, so that all but the first travel behind computation."""
    buffer_bytes: float = 0.0
    extra_saved_bytes: float = 0.0


NOTHING = Sharing()

# (strategy, sp, ulysses degree) -> the sharing of each kind of layer.
Ways = Mapping[tuple[str, int, int], tuple[Sharing, ...]]
