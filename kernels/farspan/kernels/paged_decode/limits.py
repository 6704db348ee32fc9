"""What each backend over pages cannot compute, and which one a case therefore gets: plain values, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from farspan.kernels.attention.limits import Ask, Limits

# The best first: the first that computes a case and is installed gets it.
BACKENDS: Mapping[str, Limits] = {
    "triton": Limits("cuda"),
    "native": Limits("cpu", (torch.float32, torch.bfloat16), largest_head_dim=512),
    "gathered": Limits("cpu"),
    "reference": Limits(),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The backend a case gets, and why those before it do not."""

    name: str
    passed_over: tuple[tuple[str, str], ...]


def decide(ask: Ask, absent: Mapping[str, str]) -> Decision:
    """The first backend that computes `ask`; `absent` are those this machine lacks, each with the reason."""
    passed_over: list[tuple[str, str]] = []
    for name, limits in BACKENDS.items():
        reason = limits.refusal(ask) or absent.get(name)
        if reason is None:
            return Decision(name, tuple(passed_over))
        passed_over.append((name, reason))
    raise AssertionError(f"no backend computes {ask}: {passed_over}")
