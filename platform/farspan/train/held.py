"""What one rank holds in each tier of memory, as those say who own it."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from farspan.memory.tier import Tier


class Held(NamedTuple):
    """Bytes of one rank. A tier whose speed is made up is counted for itself."""

    device: int
    dram: int
    cxl: int
    emulated_cxl: int
    nvme: int


def held_by(device: int, tiers: Iterable[Tier], optimizer: int) -> Held:
    """`device` is what the device holds, `tiers` are those of the run, `optimizer` what an offloaded one has in DRAM.

    Of a tier it counts what is taken from it, in use or kept in a pool for the next step.
    """
    taken = Counter[str]()
    for tier in tiers:
        taken[f"emulated_{tier.kind}" if tier.emulated else tier.kind] += tier.stats().used_bytes
    return Held(
        device=device,
        dram=taken["dram"] + optimizer,
        cxl=taken["cxl"],
        emulated_cxl=taken["emulated_cxl"],
        nvme=taken["nvme"],
    )


class DeviceMemory:
    """What this process holds on its device: by torch's allocator on CUDA, its resident memory on a CPU.

    On a CPU that is all of the process, its DRAM tiers and emulated ones too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            self._before = self.most_ever
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def of_step(self) -> int:
        """Most since `begin`; on a CPU, which does not remember it, now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resident_bytes()

    @property
    def most_ever(self) -> int:
        """Most at any time."""
        if self._device.type == "cuda":
            return max(self._before, torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory of this process that is in DRAM now, as the kernel counts it."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
