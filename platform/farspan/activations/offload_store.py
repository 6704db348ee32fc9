"""Saved tensors on their way to a tier and back.

What travels is memory, not tensors: all views of one storage travel once, as raw bytes, and come back as the same views
of one storage. Entries belong to groups (a layer each); groups come back in the reverse of the order they left in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from farspan.activations.offload_pool import BufferPool
from farspan.activations.poison import digest, refuse_changed
from farspan.errors import TrainingError
from farspan.memory.tier import DEADLINE_S, Allocator, Region
from farspan.memory.transfer import Transfer


@dataclass(eq=False, slots=True)
class Entry:
    """One piece of memory: here (`raw`), in the tier (`region`), or back (`back`)."""

    key: tuple[Any, ...]
    group: int
    device: torch.device
    start: int
    nbytes: int
    storage: StorageWeakRef
    source: Tensor | None
    version: int
    raw: Tensor | None
    region: Region | None
    moving: Transfer
    digest: int | None = None
    back: Tensor | None = None
    fetching: bool = False
    closed: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Handle:
    """One saved tensor: a view of an entry's memory. `offset` in bytes from the start of its storage."""

    entry: Entry
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class SavedStore:
    """The entries of one step. `debug` checks every byte and poisons returned buffers."""

    def __init__(self, tier: Allocator, owner: str, *, debug: bool, deadline_s: float = DEADLINE_S) -> None:
        self.pool = BufferPool(tier, owner, poison=debug)
        self._debug, self._deadline_s = debug, deadline_s
        # Backward of a CUDA device runs on a thread of its own.
        self._lock = threading.RLock()
        self._by_key: dict[tuple[Any, ...], Entry] = {}
        self._groups: dict[int, list[Entry]] = {}
        self._storing: list[Entry] = []
        self._leaving: list[Transfer] = []
        self.stored_bytes = 0
        self.waited_s = 0.0

    def save(self, tensor: Tensor, group: int, *, alone: bool = False) -> Handle:
        """Begin to move a tensor's memory, unless it is on its way already; `alone`: not the rest of its storage.

        Raises:
            TierFullError: the tier cannot hold it.
        """
        start, nbytes = _span(tensor, alone)
        storage = tensor.untyped_storage()
        whole = nbytes == storage.nbytes()
        # The same address may be other memory by now, and the same memory may hold other values.
        key = (storage.data_ptr(), start, nbytes, tensor._version, None if whole else tensor.dtype)
        with self._lock:
            entry = self._by_key.get(key)
            if entry is None or entry.storage.expired():
                entry = self._start(key, tensor, start, nbytes, group)
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return Handle(entry, tensor.dtype, offset, tuple(tensor.size()), tensor.stride())

    def settle(self, before_group: int) -> None:
        """Let go of the memory of groups before this one, waiting for copies that are not over."""
        with self._lock:
            ready = [e for e in self._storing if e.group < before_group or e.moving.done()]
            for entry in ready:
                self._let_go(entry)

    def prefetch(self, group: int) -> None:
        """Begin to bring back everything of the newest group up to `group`, and of the one before it."""
        with self._lock:
            for found in sorted((g for g in self._groups if g <= group), reverse=True)[:2]:
                for entry in self._groups[found]:
                    self._begin_fetch(entry)

    def restore(self, handle: Handle) -> Tensor:
        """The tensor that was saved.

        Raises:
            TrainingError: its step is over.
            StaleBufferError: its bytes changed on the way (only with debug).
        """
        with self._lock:
            entry = handle.entry
            if entry.closed:
                raise TrainingError("backward came after its step was closed; run forward and backward in one step()")
            self._leaving = [transfer for transfer in self._leaving if not transfer.done()]
            base = self._take_source(entry) if entry.raw is not None else self._bring_back(entry)
        begin = base.storage_offset() + handle.offset - entry.start
        view = torch.empty(0, dtype=handle.dtype, device=base.device)
        offset = begin // view.element_size()
        return view.set_(base.untyped_storage(), offset, handle.size, handle.stride)

    def close(self) -> None:
        """End the step: every copy is over, every buffer is back in the pool.

        Raises:
            TierError: a copy does not end; its buffer stays taken.
        """
        with self._lock:
            entries = {id(e): e for e in (*self._storing, *_all(self._groups.values()))}
            self._by_key, self._groups, self._storing = {}, {}, []
            problems: list[Exception] = []
            for entry in entries.values():
                entry.closed, entry.source = True, None
                _noting(problems, entry.moving.finish)
                if entry.region is not None and entry.moving.done():
                    self.pool.give(entry.region)
                entry.region = entry.raw = entry.back = None
            for transfer in self._leaving:
                _noting(problems, transfer.finish)
            self._leaving = []
        if problems:
            raise problems[0]

    def _start(self, key: tuple[Any, ...], tensor: Tensor, start: int, nbytes: int, group: int) -> Entry:
        storage = tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (nbytes,), (1,))
        region = self.pool.take(nbytes)
        found = digest(raw) if self._debug else None
        moving = region.tier.store(region, raw, self._deadline_s)
        ref, version = StorageWeakRef(storage), tensor._version
        entry = Entry(key, group, tensor.device, start, nbytes, ref, tensor, version, raw, region, moving, found)
        self._by_key[key] = entry
        self._groups.setdefault(group, []).append(entry)
        self._storing.append(entry)
        self.stored_bytes += nbytes
        return entry

    def _let_go(self, entry: Entry) -> None:
        self._storing.remove(entry)
        entry.moving.finish()
        self._refuse_changed_source(entry)
        entry.raw = entry.source = None

    def _refuse_changed_source(self, entry: Entry) -> None:
        # Autograd checks this itself, but not for tensors that pass through hooks.
        if entry.source is not None and entry.source._version != entry.version:
            raise TrainingError(
                f"a saved tensor of {entry.nbytes} bytes was changed in place after forward had saved it; its gradient "
                f"would be wrong; compute out of place, or keep that module (Rule(Action.KEEP, module=...))"
            )

    def _take_source(self, entry: Entry) -> Tensor:
        """Backward is here before the memory was let go: nothing needs to come back."""
        self._refuse_changed_source(entry)
        assert entry.raw is not None
        if entry in self._storing:
            self._storing.remove(entry)
            self._leave(entry)
        return entry.raw

    def _begin_fetch(self, entry: Entry) -> None:
        if entry.raw is not None or entry.fetching:
            return
        assert entry.region is not None
        entry.back = torch.empty(entry.nbytes, dtype=torch.uint8, device=entry.device)
        entry.moving = entry.region.tier.fetch(entry.region, entry.back, self._deadline_s)
        entry.fetching = True

    def _bring_back(self, entry: Entry) -> Tensor:
        if entry.region is not None:
            self._begin_fetch(entry)
            started = time.perf_counter()
            entry.moving.wait()
            self.waited_s += time.perf_counter() - started
            self._leave(entry)
            if self._debug:
                assert entry.back is not None
                assert entry.digest is not None
                refuse_changed(entry.back, entry.digest, f"layer {entry.group}, {entry.nbytes} bytes")
        assert entry.back is not None
        return entry.back

    def _leave(self, entry: Entry) -> None:
        """From here on only the graph holds it: its memory goes when the last node that needs it has run."""
        assert entry.region is not None
        self._groups[entry.group].remove(entry)
        if not self._groups[entry.group]:
            del self._groups[entry.group]
        if self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]
        region, entry.region = entry.region, None
        if self._debug:
            entry.moving.finish()
        self._leaving.append(entry.moving)
        self.pool.give(region)


def _span(tensor: Tensor, alone: bool) -> tuple[int, int]:
    """(first byte, bytes) of the memory to move: the whole storage, unless the tensor uses less than half of it."""
    item, total = tensor.element_size(), tensor.untyped_storage().nbytes()
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    used = (last + 1) * item
    return (0, total) if 2 * used >= total and not alone else (int(tensor.storage_offset()) * item, used)


def _all(groups: Iterable[list[Entry]]) -> list[Entry]:
    return [entry for group in groups for entry in group]


def _noting(problems: list[Exception], call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as problem:
        problems.append(problem)
