"""A file on a fast local disk, read and written around the page cache (O_DIRECT) by worker threads.

O_DIRECT wants aligned addresses, offsets and lengths, so bytes pass through an aligned buffer of the working thread.
The file has no name: when its process ends, however it ends, the disk is free again.
Every region carries a digest of what was stored; fetching checks it.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import threading
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from farspan.errors import CorruptDataError, TierError, TierFullError
from farspan.memory.extents import Extents
from farspan.memory.tier import Region, Tier

_ALIGN_BYTES = 4096
_CHUNK_BYTES = 8 << 20
_log = logging.getLogger(__name__)


class NvmeTier(Tier):
    """`capacity_bytes` of the disk that holds `folder`."""

    granularity = _ALIGN_BYTES

    def __init__(self, folder: Path, capacity_bytes: int, *, num_threads: int = 4) -> None:
        """
        Raises:
            TierError: the folder cannot be used, or its disk has less free space than `capacity_bytes`.
        """
        super().__init__(f"nvme:{folder}", "nvme", capacity_bytes, num_threads)
        try:
            free = shutil.disk_usage(folder).free
            if free < capacity_bytes:
                raise TierError(self.label, f"has {free} bytes free, {capacity_bytes} are asked for; ask for less")
            self._file, self.direct = _open_nameless(folder)
        except OSError as problem:
            self._lane.close()
            raise TierError(self.label, f"cannot be used: {problem}; name a folder on a local disk") from None
        except TierError:
            self._lane.close()
            raise
        if not self.direct:
            _log.warning("%s refuses O_DIRECT: its bytes pass through the page cache and use memory there", self.label)
        self._extents = Extents(capacity_bytes // _ALIGN_BYTES * _ALIGN_BYTES)
        self._buffers = threading.local()

    def _reserve(self, nbytes: int, owner: str) -> object:
        start = self._extents.take(nbytes)
        if start is None:
            # What is free is in smaller pieces.
            raise TierFullError(self.label, owner, nbytes, self._extents.largest, self.capacity_bytes)
        return start

    def _release(self, region: Region) -> None:
        self._extents.give(_offset(region), region.held_bytes)

    def _write(self, region: Region, raw: Tensor) -> None:
        digest = xxhash.xxh3_64()
        memory, buffer = self._buffer()
        for begin in range(0, raw.numel(), _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, raw.numel() - begin)
            buffer[:size].copy_(raw[begin : begin + size])
            digest.update(memory[:size])
            self._all(os.pwritev, memory[: _aligned(size)], _offset(region) + begin, "writing")
        region.digest = digest.intdigest()

    def _read(self, region: Region, raw: Tensor) -> None:
        if region.digest is None:
            raise TierError(self.label, f"nothing is stored in this region of {region.owner}; store before fetching")
        digest = xxhash.xxh3_64()
        memory, buffer = self._buffer()
        for begin in range(0, raw.numel(), _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, raw.numel() - begin)
            self._all(os.preadv, memory[: _aligned(size)], _offset(region) + begin, "reading")
            digest.update(memory[:size])
            raw[begin : begin + size].copy_(buffer[:size])
        check_digest(self.label, region, digest.intdigest())

    def _all(self, call, memory: memoryview, offset: int, verb: str) -> None:  # type: ignore[no-untyped-def]
        """Read or write all of `memory`, which the kernel may do in parts."""
        done = 0
        while done < len(memory):
            try:
                moved = call(self._file, [memory[done:]], offset + done)
            except OSError as problem:
                raise TierError(self.label, f"{verb} failed: {problem}; is the disk full or broken?") from None
            if moved <= 0:
                raise TierError(self.label, f"{verb} ended after {done} of {len(memory)} bytes; was the file cut?")
            done += moved

    def _buffer(self) -> tuple[memoryview, Tensor]:
        """This thread's aligned buffer, as the system calls and as tensors see it."""
        if not hasattr(self._buffers, "pair"):
            mapped = mmap.mmap(-1, _CHUNK_BYTES)
            self._buffers.pair = memoryview(mapped), torch.frombuffer(mapped, dtype=torch.uint8)
        pair: tuple[memoryview, Tensor] = self._buffers.pair
        return pair

    def _shut(self) -> None:
        os.close(self._file)


def check_digest(tier: str, region: Region, found: int) -> None:
    """
    Raises:
        CorruptDataError: the bytes that came back are not the ones that were stored.
    """
    if found != region.digest:
        raise CorruptDataError(
            tier, f"{region.nbytes} bytes of {region.owner} came back changed; the device is at fault"
        )


def digest_of(raw: Tensor) -> int:
    """xxh3 of 1-D bytes on the CPU."""
    return xxhash.xxh3_64_intdigest(raw.numpy().data)


def _open_nameless(folder: Path) -> tuple[int, bool]:
    """(a file without a name, whether it goes around the page cache)."""
    flags = os.O_RDWR | os.O_TMPFILE
    try:
        return os.open(folder, flags | os.O_DIRECT, 0o600), True
    except OSError:
        return os.open(folder, flags, 0o600), False


def _offset(region: Region) -> int:
    assert isinstance(region.place, int)
    return region.place


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
