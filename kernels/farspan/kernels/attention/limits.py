"""What each attention backend cannot compute, and which one a case therefore gets: plain values, no tensors.

Offsets and windows are in no list: every backend computes any band (flash kernels through flash.core_of).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of attention, as far as a backend may have to refuse it."""

    device: str
    dtype: torch.dtype
    qk_dim: int
    v_dim: int
    softcap: bool = False
    capability: tuple[int, int] | None = None
    """Of the CUDA device."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, qk_dim: int, v_dim: int, softcap: float | None = None) -> Ask:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device.type, dtype, qk_dim, v_dim, softcap is not None, capability)

    @classmethod
    def of(cls, q_THD: Tensor, v_SGC: Tensor, softcap: float | None = None) -> Ask:
        return cls.on(q_THD.device, q_THD.dtype, q_THD.shape[-1], v_SGC.shape[-1], softcap)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend computes; a field at its default sets no limit."""

    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dim_step: int = 1
    largest_head_dim: int | None = None
    equal_head_dims: bool = False
    softcap: bool = True
    capability: tuple[int, int] = (0, 0)
    below_capability: tuple[int, int] = (1000, 0)

    def refusal(self, ask: Ask) -> str | None:
        """Why this backend does not compute `ask`; none where it does."""
        if self.device is not None and ask.device != self.device:
            return f"runs on {self.device} only"
        if ask.capability is not None and not self.capability <= ask.capability < self.below_capability:
            return f"is not made for compute capability {ask.capability[0]}.{ask.capability[1]}"
        if self.dtypes is not None and ask.dtype not in self.dtypes:
            return f"does not compute {str(ask.dtype).removeprefix('torch.')}"
        if ask.softcap and not self.softcap:
            return "has no soft cap"
        if self.equal_head_dims and ask.qk_dim != ask.v_dim:
            return f"needs one head dim for keys and values, got {ask.qk_dim} and {ask.v_dim}"
        largest = max(ask.qk_dim, ask.v_dim)
        if self.largest_head_dim is not None and largest > self.largest_head_dim:
            return f"ends at head dim {self.largest_head_dim}, got {largest}"
        if largest % self.head_dim_step:
            return f"needs head dims divisible by {self.head_dim_step}, got {largest}"
        return None


def _flash(capability: tuple[int, int], below: tuple[int, int] = (1000, 0), *, softcap: bool) -> Limits:
    return Limits("cuda", _HALF, 8, 256, True, softcap, capability, below)


# The best first: the first that computes a case and is installed gets it.
BACKENDS: Mapping[str, Limits] = {
    "flash-attn 3": _flash((9, 0), (10, 0), softcap=True),
    # 1.5 to 2 times as fast as torch flash on an H200 (decision 0029); elsewhere nobody has measured it.
    "torch cudnn": Limits("cuda", _HALF, 8, 128, True, False, (9, 0), (10, 0)),
    "flash-attn 2": _flash((8, 0), softcap=True),
    "torch flash": _flash((8, 0), softcap=False),
    "triton": Limits("cuda"),
    "cpu": Limits("cpu"),
    "tiled": Limits(),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The backend a case gets, and why those before it do not."""

    name: str
    passed_over: tuple[tuple[str, str], ...]


def decide(ask: Ask, absent: Mapping[str, str], backends: Mapping[str, Limits] = BACKENDS) -> Decision:
    """The first of `backends` that computes `ask`; `absent` are those this machine lacks, each with the reason."""
    passed_over: list[tuple[str, str]] = []
    for name, limits in backends.items():
        reason = limits.refusal(ask) or absent.get(name)
        if reason is None:
            return Decision(name, tuple(passed_over))
        passed_over.append((name, reason))
    raise AssertionError(f"no backend computes {ask}: {passed_over}")
