"""A tier that behaves like DRAM with another bandwidth and latency: for planning and for tests without the hardware.

Its bytes are real, its speed is made up. Everything it prints says "emulated".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from farspan.memory.host import HostTier
from farspan.memory.tier import Region


@dataclass(frozen=True, slots=True)
class Shape:
    """The speed to show: bytes per second in each direction, and seconds before the first byte of a transfer."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    latency_s: float

    def seconds(self, nbytes: int, *, reading: bool) -> float:
        """What one transfer takes on an idle link."""
        return self.latency_s + nbytes / (self.read_bytes_per_s if reading else self.write_bytes_per_s)


class EmulatedTier(HostTier):
    """One link of that shape: transfers follow each other on it. It is never faster than the DRAM beneath."""

    emulated = True

    def __init__(
        self,
        name: str,
        kind: str,
        capacity_bytes: int,
        shape: Shape,
        *,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`now` and `pause` are the clock it keeps time by."""
        super().__init__(name, kind, capacity_bytes)
        self.shape, self._now, self._pause = shape, now, pause
        self._link = threading.Lock()

    def _write(self, region: Region, raw: Tensor) -> None:
        self._shaped(super()._write, region, raw, reading=False)

    def _read(self, region: Region, raw: Tensor) -> None:
        self._shaped(super()._read, region, raw, reading=True)

    def _shaped(self, copy: Callable[[Region, Tensor], None], region: Region, raw: Tensor, *, reading: bool) -> None:
        with self._link:
            until = self._now() + self.shape.seconds(raw.numel(), reading=reading)
            copy(region, raw)
            if (left := until - self._now()) > 0:
                self._pause(left)
