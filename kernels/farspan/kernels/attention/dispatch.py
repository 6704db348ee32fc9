"""Choose an attention backend once, by device. What was chosen has a name; a caller that logs it hides nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from farspan.kernels.attention.contract import Backward, Forward
from farspan.kernels.attention.cpu import attend_cpu, attend_cpu_backward
from farspan.kernels.attention.packed import PackedBackward, PackedForward, backward_each, forward_each
from farspan.kernels.attention.tiled import attend_tiled, attend_tiled_backward


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute the contracts of contract.py and packed.py."""

    name: str
    forward: Forward
    backward: Backward
    packed_forward: PackedForward
    packed_backward: PackedBackward


def choose_attention(device: torch.device) -> tuple[Forward, Backward]:
    """(forward, backward) of a pair, for tensors on `device`."""
    backend = choose_backend(device)
    return backend.forward, backend.backward


def choose_backend(device: torch.device) -> Backend:
    """The fused CPU kernel on CPU; Triton on CUDA where it is installed; tiles of plain torch elsewhere."""
    if device.type == "cpu":
        return pairwise_backend("cpu", attend_cpu, attend_cpu_backward)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return triton_backend()
    return pairwise_backend("tiled", attend_tiled, attend_tiled_backward)


def pairwise_backend(name: str, forward: Forward, backward: Backward) -> Backend:
    """A backend that computes packed documents one after another."""
    return Backend(name, forward, backward, forward_each(forward), backward_each(backward))


def triton_backend() -> Backend:
    """Our Triton kernels; packed documents are one launch. Needs Triton, and CUDA tensors or its interpreter."""
    from farspan.kernels.attention.triton import attend_packed_triton, attend_triton
    from farspan.kernels.attention.triton_backward import attend_packed_triton_backward, attend_triton_backward

    return Backend("triton", attend_triton, attend_triton_backward, attend_packed_triton, attend_packed_triton_backward)
