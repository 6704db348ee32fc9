"""Choose a partial-attention backend once, by device."""

from __future__ import annotations

import torch

from farspan.kernels.attention.contract import Backward, Forward
from farspan.kernels.attention.cpu import attend_cpu, attend_cpu_backward
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward


def choose_attention(device: torch.device) -> tuple[Forward, Backward]:
    """(forward, backward) for tensors on `device`."""
    if device.type == "cpu":
        return attend_cpu, attend_cpu_backward
    return attend_reference, attend_reference_backward
