"""Memory of this host: DRAM, pinned where there is a CUDA device, and CXL memory that Linux shows as a NUMA node.

Region memory comes straight from mmap: page-aligned, exactly as large as asked (torch's pinned allocator rounds up to
powers of two), bound to a NUMA node where one is named, and registered with CUDA.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from farspan.errors import TierError
from farspan.memory.inplace import InPlaceTier, memory_at
from farspan.memory.numa import bind_to_node
from farspan.memory.tier import Region


class HostTier(InPlaceTier):
    """Memory the processor reads and writes in place."""

    granularity = mmap.PAGESIZE

    def __init__(
        self, name: str, kind: str, capacity_bytes: int, *, node: int | None = None, device: torch.device | None = None
    ) -> None:
        """`node`: the NUMA node its pages must come from. `device`: the CUDA device it is pinned for, if any."""
        super().__init__(name, kind, capacity_bytes, device)
        self.node = node

    def _reserve(self, nbytes: int, owner: str) -> object:
        memory = self._map(nbytes, owner)
        if self.streams is not None:
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)
            if int(status) != 0:
                raise TierError(self.label, f"CUDA could not pin {nbytes} bytes for {owner} ({status}); ask for less")
        return memory

    def _map(self, nbytes: int, owner: str) -> Tensor:
        """
        Raises:
            MemoryError: the host has less than the tier may take.
        """
        try:
            mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as problem:
            raise MemoryError(f"memory tier {self.label}: {nbytes} bytes for {owner} were refused: {problem}") from None
        # The tensor keeps the mapping alive; it is unmapped with its last view.
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        if self.node is not None:
            bind_to_node(memory.data_ptr(), nbytes, self.node, self.label)
        return memory

    def _release(self, region: Region) -> None:
        if self.streams is not None:
            torch.cuda.cudart().cudaHostUnregister(memory_at(region).data_ptr())
        region.place = None


class DramTier(HostTier):
    """The DRAM of this host: pinned for `device` when that is a CUDA device, plain otherwise."""

    def __init__(
        self, capacity_bytes: int, *, device: torch.device | None = None, node: int | None = None, name: str = "dram"
    ) -> None:
        super().__init__(name, "dram", capacity_bytes, node=node, device=device)


class CxlTier(HostTier):
    """CXL memory shown by Linux as a NUMA node without processors: every page of every region comes from that node."""

    def __init__(self, node: int, capacity_bytes: int, *, device: torch.device | None = None) -> None:
        super().__init__(f"cxl{node}", "cxl", capacity_bytes, node=node, device=device)
