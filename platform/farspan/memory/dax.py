"""CXL memory as a DAX device or a file: mapped once, shared, and cut into regions."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import TierError
from farspan.memory.extents import Extents
from farspan.memory.host import HostTier
from farspan.memory.inplace import memory_at
from farspan.memory.tier import Region

# Device DAX maps whole huge pages only.
_ALIGN_BYTES = 2 << 20


class DaxTier(HostTier):
    """Memory behind /dev/daxX.Y, or behind a file of a DAX file system; a plain file works too, for tests."""

    def __init__(self, path: Path, capacity_bytes: int, *, device: torch.device | None = None) -> None:
        """
        Raises:
            TierError: it cannot be opened or mapped, or is smaller than `capacity_bytes`.
        """
        super().__init__(f"dax:{path}", "cxl", capacity_bytes // _ALIGN_BYTES * _ALIGN_BYTES, device=device)
        try:
            file = os.open(path, os.O_RDWR)
            try:
                mapped = mmap.mmap(file, self.capacity_bytes, flags=mmap.MAP_SHARED)
            finally:
                os.close(file)
        except (OSError, ValueError) as problem:
            self._lane.close()
            raise TierError(self.label, f"{capacity_bytes} bytes could not be mapped: {problem}") from None
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._extents = Extents(self.capacity_bytes)

    def _map(self, nbytes: int) -> Tensor:
        start = self._extents.take(nbytes)
        if start is None:
            raise TierError(self.label, f"no hole of {nbytes} bytes is left, its free memory is in smaller pieces")
        return self._memory[start : start + nbytes]

    def _release(self, region: Region) -> None:
        start = memory_at(region).data_ptr() - self._memory.data_ptr()
        super()._release(region)
        self._extents.give(start, region.held_bytes)

    def _shut(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
