"""Memory that several processes of one host map: a file without a name, handed from process to process.

Nobody can look for it, and it is gone with the last process that maps it, however that one ends. Its size is sealed,
so that no process can take memory away under another.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import weakref

import torch
from torch import Tensor

from farspan.errors import TierError
from farspan.memory.available import available_bytes
from farspan.memory.inplace import InPlaceTier
from farspan.memory.tier import Region

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# What a host keeps for everybody else.
_SPARE_BYTES = 256 << 20


class SharedTier(InPlaceTier):
    """Slots of one size. Who may use which of them is decided by one process for all (kv/host_index.py)."""

    def __init__(self, file: int, num_slots: int, slot_bytes: int, name: str = "shared") -> None:
        """Maps what another process made, and takes the descriptor over.

        Raises:
            TierError: it is not a sealed file of this size.
        """
        super().__init__(name, "dram", num_slots * slot_bytes, None)
        self.file, self.num_slots, self.slot_bytes = file, num_slots, slot_bytes
        try:
            _refuse_file(file, self.capacity_bytes)
            # The tensor keeps the mapping alive; it is unmapped with its last view.
            mapped = mmap.mmap(file, self.capacity_bytes)
        except (OSError, ValueError) as problem:
            self._lane.close()
            os.close(file)
            raise TierError(self.label, f"{self.capacity_bytes} bytes could not be mapped: {problem}") from None
        self._memory_SB: Tensor = torch.frombuffer(mapped, dtype=torch.uint8).view(num_slots, slot_bytes)
        # An open descriptor keeps the memory too.
        self._close_file = weakref.finalize(self, os.close, file)

    @classmethod
    def create(cls, capacity_bytes: int, slot_bytes: int, name: str = "shared") -> SharedTier:
        """As many slots as fit. Their memory is taken at once: later, nobody could be told that there is none.

        Raises:
            TierError: not one slot fits, or the host has less.
        """
        if sys.platform != "linux":
            raise TierError(name, "needs files without a name, which only Linux has")
        num_slots = capacity_bytes // slot_bytes
        if num_slots < 1:
            raise TierError(name, f"{capacity_bytes} bytes hold not one slot of {slot_bytes} bytes; give it more")
        nbytes, free = num_slots * slot_bytes, available_bytes()
        if nbytes > free - _SPARE_BYTES:
            raise TierError(name, f"{nbytes} bytes asked for, the host has {free} left; ask for less")
        file = os.memfd_create(f"farspan-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(file, 0, nbytes)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as problem:
            os.close(file)
            raise TierError(name, f"{nbytes} bytes were refused: {problem}; ask for less") from None
        return cls(file, num_slots, slot_bytes, name)

    def region(self, slot: int, owner: str) -> Region:
        """One slot, for whoever was given it."""
        memory = self._memory_SB[slot]
        return Region(self, self.slot_bytes, owner, memory, self.slot_bytes)

    def _reserve(self, nbytes: int, owner: str) -> object:
        raise TierError(self.label, f"has slots, no regions of {nbytes} bytes; {owner} must be given a slot")

    def _release(self, region: Region) -> None:
        raise AssertionError("no region was allocated")

    def _shut(self) -> None:
        self._memory_SB = torch.empty(0, dtype=torch.uint8)
        self._close_file()


def _refuse_file(file: int, nbytes: int) -> None:
    """Raises OSError unless the file is a sealed one of so many bytes."""
    if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(file).st_size != nbytes:
        raise OSError(f"it is not a sealed file of {nbytes} bytes")
