"""Bytes one process keeps for weights, AdamW's states and gradients, per engine. Pure formulas.

fp32 everywhere but in the compute copy; a run in float64 keeps twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.config.schema import WeightsConfig

_MASTER, _MOMENTS, _GRADIENT = 4, 4 + 4, 4
# Two codes, and two fp32 scales for each 256 numbers.
_MOMENTS_8BIT = 2 + 2 * 4 / 256


@dataclass(frozen=True, slots=True)
class WeightsBytes:
    """What one process keeps between steps, and the gradients of one."""

    state: int
    gradient: int
    host: int
    """Part of `state` that lies in host memory although the run computes elsewhere."""


def weights_bytes(
    weights: WeightsConfig,
    num_frozen: int,
    num_trained: int,
    num_ranks: int,
    compute_bytes: int,
    optimizer: str = "adamw",
) -> WeightsBytes:
    """Frozen weights are kept in the compute type and have neither states nor gradients.

    FSDP2 cuts everything and casts where it computes; with states in host memory weights are kept on both sides, and
    gradients arrive there. ZeRO keeps a copy in the compute type beside its fp32 weights,
    whole below stage 3, and gradients whole below stage 2.
    """
    wide = max(1, compute_bytes // 4)
    moments = _MOMENTS_8BIT if optimizer == "adamw8bit" else _MOMENTS * wide
    states = round((_MASTER * wide + moments) * num_trained) // num_ranks
    gradient = _GRADIENT * wide * num_trained
    if weights.engine == "fsdp2":
        kept = states + compute_bytes * num_frozen // num_ranks
        if weights.offload_optimizer == "none":
            return WeightsBytes(kept, gradient // num_ranks, 0)
        arriving = gradient // num_ranks
        return WeightsBytes(kept + _MASTER * wide * num_trained // num_ranks + arriving, 0, states + arriving)
    copy = compute_bytes * (num_frozen + num_trained) // (num_ranks if weights.zero == 3 else 1)
    host = states if weights.offload_optimizer == "cpu" else 0
    return WeightsBytes(states + copy, gradient // (num_ranks if weights.zero > 1 else 1), host)
