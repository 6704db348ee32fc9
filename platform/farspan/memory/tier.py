"""What every memory tier does: hand out owned regions, store tensors into them, fetch them back, count bytes.

Nothing is interpreted: a tensor is its bytes. Transfers of one region follow each other; transfers of different regions
do not.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from farspan.errors import StaleBufferError, TierError, TierFullError
from farspan.memory.transfer import Finished, ThreadLane, Transfer

DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class TierStats:
    """Bytes. `owners` says who holds what is used now."""

    tier: str
    capacity_bytes: int
    used_bytes: int
    peak_bytes: int
    stored_bytes: int
    fetched_bytes: int
    owners: dict[str, int]


@dataclass(eq=False, slots=True)
class Region:
    """`nbytes` of a tier, held by `owner` until it is freed. `place` is the tier's own: memory, an extent, a key."""

    tier: Tier
    nbytes: int
    owner: str
    place: object
    held_bytes: int
    digest: int | None = None
    last: Transfer = field(default_factory=Finished)
    freed: bool = False


class Allocator(Protocol):
    """Whoever hands out regions: a tier, or several that share the load. A region is used through its own tier."""

    @property
    def label(self) -> str: ...

    def allocate(self, nbytes: int, owner: str) -> Region: ...


class Tier(ABC):
    """One kind of memory of a fixed capacity. Safe to use from several threads."""

    granularity = 1
    """A region holds a multiple of this many bytes."""
    emulated = False
    """Whether its speed is made up; if so, every output must say it."""

    def __init__(self, name: str, kind: str, capacity_bytes: int, num_threads: int = 1) -> None:
        self.name, self.kind, self.capacity_bytes = name, kind, capacity_bytes
        self._lane = ThreadLane(name, num_threads)
        self._lock = threading.Lock()
        self._used = self._peak = self._stored = self._fetched = 0
        self._owners: Counter[str] = Counter()
        self._closed = False

    @property
    def label(self) -> str:
        """The name to print: an emulated tier is always called so."""
        return f"{self.name} (emulated)" if self.emulated else self.name

    def allocate(self, nbytes: int, owner: str) -> Region:
        """A region of its own for `owner`; its content is undefined.

        Raises:
            TierFullError: there is no room.
            TierError: the tier is closed, or nbytes is not positive.
        """
        if nbytes <= 0:
            raise TierError(self.label, f"{owner} asked for {nbytes} bytes; a region has at least one")
        held = -(-nbytes // self.granularity) * self.granularity
        with self._lock:
            if self._closed:
                raise TierError(self.label, f"{owner} asked for memory after it was closed; open the tier again")
            if self._used + held > self.capacity_bytes:
                free = self.capacity_bytes - self._used
                raise TierFullError(self.label, owner, held, free, self.capacity_bytes)
            region = Region(self, nbytes, owner, self._reserve(held, owner), held)
            self._used += held
            self._peak = max(self._peak, self._used)
            self._owners[owner] += held
        return region

    def free(self, region: Region) -> None:
        """Give a region back, once its last transfer is over.

        Raises:
            TierError: that transfer does not end; the region stays held.
        """
        self._check(region)
        try:
            region.last.finish()
        except Exception:
            # Whoever waited for a failed transfer was told. One that never ended may still touch the memory.
            if not region.last.done():
                raise
        region.freed = True
        with self._lock:
            self._release(region)
            self._used -= region.held_bytes
            self._owners[region.owner] -= region.held_bytes
            if self._owners[region.owner] == 0:
                del self._owners[region.owner]

    def store(self, region: Region, source: Tensor, deadline_s: float = DEADLINE_S) -> Transfer:
        """Begin to copy `source` (contiguous) to the start of a region. It must not change until the transfer ends."""
        raw = self._checked(region, source)
        region.last = self._begin_store(region, raw, region.last, deadline_s)
        with self._lock:
            self._stored += raw.numel()
        return region.last

    def fetch(self, region: Region, target: Tensor, deadline_s: float = DEADLINE_S) -> Transfer:
        """Begin to fill `target` (contiguous) from the start of a region. It must not be touched until that ends."""
        raw = self._checked(region, target)
        region.last = self._begin_fetch(region, raw, region.last, deadline_s)
        with self._lock:
            self._fetched += raw.numel()
        return region.last

    def poison(self, region: Region) -> None:
        """Make what a region holds unusable, at once and without waiting for anybody: a reader left over must notice.

        Bytes become 0xFF, which is NaN in every floating-point type; where that costs a write, the digest is dropped.
        """
        region.digest = None

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                self.label, self.capacity_bytes, self._used, self._peak, self._stored, self._fetched, dict(self._owners)
            )

    def close(self) -> None:
        """End the tier.

        Raises:
            TierError: somebody still holds memory of it; the message says who.
        """
        with self._lock:
            self._closed, owners = True, dict(self._owners)
        self._lane.close()
        self._shut()
        if owners:
            held = ", ".join(f"{owner} {nbytes} bytes" for owner, nbytes in sorted(owners.items()))
            raise TierError(self.label, f"was closed while memory was held: {held}; free it first")

    def _check(self, region: Region) -> None:
        if region.tier is not self:
            raise TierError(self.label, f"was given a region of {region.tier.label}; regions stay with their tier")
        if region.freed:
            raise StaleBufferError(f"memory tier {self.label}: a region of {region.owner} was used after it was freed")

    def _checked(self, region: Region, tensor: Tensor) -> Tensor:
        self._check(region)
        if not tensor.is_contiguous():
            raise TierError(
                self.label, f"{region.owner} gave a tensor that is not contiguous; call .contiguous() first"
            )
        raw = as_bytes(tensor)
        if raw.numel() > region.nbytes:
            raise TierError(
                self.label, f"{region.owner} moves {raw.numel()} bytes of a region of {region.nbytes}; ask for more"
            )
        return raw

    def _begin_store(self, region: Region, raw: Tensor, after: Transfer, deadline_s: float) -> Transfer:
        computed = _computed(raw)

        def job() -> None:
            after.finish()
            computed()
            self._write(region, raw)

        return self._lane.submit(job, f"storing {raw.numel()} bytes of {region.owner}", deadline_s)

    def _begin_fetch(self, region: Region, raw: Tensor, after: Transfer, deadline_s: float) -> Transfer:
        computed = _computed(raw)

        def job() -> None:
            after.finish()
            computed()
            self._read(region, raw)

        return self._lane.submit(job, f"fetching {raw.numel()} bytes of {region.owner}", deadline_s)

    @abstractmethod
    def _reserve(self, nbytes: int, owner: str) -> object:
        """The place of a new region; called under the lock, within capacity."""

    @abstractmethod
    def _release(self, region: Region) -> None:
        """The place of a region is free again; called under the lock."""

    @abstractmethod
    def _write(self, region: Region, raw: Tensor) -> None:
        """Copy bytes into a region; runs on a worker thread."""

    @abstractmethod
    def _read(self, region: Region, raw: Tensor) -> None:
        """Copy bytes out of a region; runs on a worker thread."""

    def _shut(self) -> None:
        """Give back what the tier itself holds; called once its threads have ended."""
        return None


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, 1-D, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


class _computed:
    """Called on a worker thread: waits until what the caller's CUDA stream had queued at construction is over."""

    def __init__(self, raw: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if raw.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(raw.device))

    def __call__(self) -> None:
        if self._event is not None:
            self._event.synchronize()
