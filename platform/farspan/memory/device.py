"""The memory of an accelerator."""

from __future__ import annotations

import torch

from farspan.memory.inplace import InPlaceTier
from farspan.memory.tier import Region


class DeviceTier(InPlaceTier):
    """Memory of a CUDA device. Its tensors are stored and fetched by copies inside the device."""

    granularity = 512

    def __init__(self, device: torch.device, capacity_bytes: int) -> None:
        super().__init__(str(device), "device", capacity_bytes, device)
        self._device = device

    def _reserve(self, nbytes: int, owner: str) -> object:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _release(self, region: Region) -> None:
        region.place = None
