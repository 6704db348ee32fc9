"""Tiers whose memory is computed on where it is: tensors over it need no copy."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.memory.tier import Region, Tier
from farspan.memory.transfer import StreamLane, Transfer


class InPlaceTier(Tier):
    """A tier whose regions are tensors. CUDA tensors travel on CUDA streams, others on a worker thread."""

    def __init__(self, name: str, kind: str, capacity_bytes: int, device: torch.device | None) -> None:
        super().__init__(name, kind, capacity_bytes)
        self.streams = StreamLane(name, device) if device is not None and device.type == "cuda" else None

    def memory_of(self, region: Region) -> Tensor:
        """The bytes of a region, uint8, in place."""
        self._check(region)
        return memory_at(region)[: region.nbytes]

    def poison(self, region: Region) -> None:
        memory_at(region).fill_(0xFF)

    def _begin_store(self, region: Region, raw: Tensor, after: Transfer, deadline_s: float) -> Transfer:
        if self.streams is None or not raw.is_cuda:
            return super()._begin_store(region, raw, after, deadline_s)
        memory = memory_at(region)[: raw.numel()]
        return self.streams.copy(memory, raw, after, f"storing for {region.owner}", deadline_s, back=False)

    def _begin_fetch(self, region: Region, raw: Tensor, after: Transfer, deadline_s: float) -> Transfer:
        if self.streams is None or not raw.is_cuda:
            return super()._begin_fetch(region, raw, after, deadline_s)
        memory = memory_at(region)[: raw.numel()]
        return self.streams.copy(raw, memory, after, f"fetching for {region.owner}", deadline_s, back=True)

    def _write(self, region: Region, raw: Tensor) -> None:
        memory_at(region)[: raw.numel()].copy_(raw)

    def _read(self, region: Region, raw: Tensor) -> None:
        raw.copy_(memory_at(region)[: raw.numel()])


def memory_at(region: Region) -> Tensor:
    """All bytes a region holds, without asking whether it was freed."""
    assert isinstance(region.place, Tensor)
    return region.place
