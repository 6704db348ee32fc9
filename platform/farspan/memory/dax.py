"""CXL memory as a DAX device or a file: mapped once, shared, and cut into regions.

Processes that name one device each take a part of it, marked by a lock that goes with the process.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import TierError, TierFullError
from farspan.memory.extents import Extents
from farspan.memory.host import HostTier
from farspan.memory.inplace import memory_at
from farspan.memory.tier import Region

# Device DAX maps whole huge pages only.
_ALIGN_BYTES = 2 << 20


class DaxTier(HostTier):
    """Memory behind /dev/daxX.Y, or behind a file of a DAX file system; a plain file works too, for tests."""

    def __init__(self, path: Path, capacity_bytes: int, *, device: torch.device | None = None) -> None:
        """`capacity_bytes` are this process's: the first part of that size which nobody else has is taken.

        Raises:
            TierError: it cannot be opened or mapped, or has no `capacity_bytes` left.
        """
        super().__init__(f"dax:{path}", "cxl", capacity_bytes // _ALIGN_BYTES * _ALIGN_BYTES, device=device)
        try:
            self._file = os.open(path, os.O_RDWR)
            try:
                mapped = _map_free_part(self._file, self.capacity_bytes)
            except BaseException:
                os.close(self._file)
                raise
        except (OSError, ValueError) as problem:
            self._lane.close()
            reason = f"{capacity_bytes} bytes that no other process has could not be mapped: {problem}"
            raise TierError(self.label, reason) from None
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._extents = Extents(self.capacity_bytes)

    def _map(self, nbytes: int, owner: str) -> Tensor:
        start = self._extents.take(nbytes)
        if start is None:
            # What is free is in smaller pieces.
            raise TierFullError(self.label, owner, nbytes, self._extents.largest, self.capacity_bytes)
        return self._memory[start : start + nbytes]

    def _release(self, region: Region) -> None:
        start = memory_at(region).data_ptr() - self._memory.data_ptr()
        super()._release(region)
        self._extents.give(start, region.held_bytes)

    def _shut(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self._file)


def _map_free_part(file: int, nbytes: int) -> mmap.mmap:
    """The first part of `nbytes` that no other open file holds a lock on; the lock goes when `file` is closed.

    Raises:
        OSError, ValueError: what is left of the file is smaller.
    """
    for part in count():
        mapped = mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED, offset=part * nbytes)
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, part * nbytes, nbytes, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            return mapped
        except OSError as problem:
            mapped.close()
            if problem.errno not in (errno.EAGAIN, errno.EACCES):
                raise
    raise AssertionError("files end")
