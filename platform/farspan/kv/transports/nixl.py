"""Pages between processes by NIXL: registered memory read directly, over shared memory, TCP or RDMA.

Every process start is a new agent name: re-adding a restarted peer under an old name is refused by NIXL.
A read that is still pending is never released: releasing does not stop the bytes that are under way.
"""

from __future__ import annotations

import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from typing import Any

import numpy as np
import torch

from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.ticket import SourceAddress
from farspan.kv.transports.base import EpochRead, Read, ReadStatus

_STATUS = {"PROC": ReadStatus.PENDING, "DONE": ReadStatus.DONE, "ERR": ReadStatus.FAILED}
_EPOCH_BYTES, _LEAST_EPOCHS = 8, 1024
# How long NIXL's own thread waits for an event before it looks by itself.
_LOOK_EVERY_US = 10_000
# Workers restart under new names: those not read from for longest are forgotten beyond this many.
_MOST_PEERS = 256


class NixlTransport:
    name = "nixl"

    def __init__(self, pool: PagePool) -> None:
        """Raises TransferError when NIXL is not installed, cannot start, has no UCX, or does not take the pages."""
        self._pool = pool
        self._incarnation = uuid.uuid4().hex
        self._agent = make_agent(self._incarnation)
        try:
            self._registered = [self._agent.register_memory([t]) for t in (pool.storage_PB, pool.epochs_P)]
        except Exception as problem:
            raise TransferError(self._incarnation, f"NIXL could not register the pages: {problem}") from None
        self._memory = "VRAM" if pool.device.type == "cuda" else "DRAM"
        self._device = pool.device.index or 0
        self._peers, self._buffers = _Peers(self._agent), _EpochBuffers(self._agent)

    def address(self) -> SourceAddress:
        pool = self._pool
        return SourceAddress(
            transport=self.name,
            incarnation=self._incarnation,
            metadata=self._agent.get_agent_metadata(),
            pages_address=pool.storage_PB.data_ptr(),
            epochs_address=pool.epochs_P.data_ptr(),
            num_pages=pool.num_pages,
        )

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Read:
        size, base = self._pool.layout.page_bytes, self._pool.storage_PB.data_ptr()
        runs = adjacent_runs(remote, local)
        here = [(base + at * size, count * size, self._device) for _, at, count in runs]
        there = [(source.pages_address + at * size, count * size, self._device) for at, _, count in runs]
        return self._post(source, here, there, self._memory, ExitStack(), None)

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> EpochRead:
        first, count = min(remote), max(remote) - min(remote) + 1
        there = [(source.epochs_address + first * _EPOCH_BYTES, count * _EPOCH_BYTES, 0)]
        held, wanted = ExitStack(), [page - first for page in remote]
        try:
            epochs = self._buffers.take(count)
        except Exception as problem:
            raise TransferError(source.incarnation, f"NIXL could not register memory: {problem}") from None
        held.callback(self._buffers.give, epochs)
        here = [(epochs.data_ptr(), count * _EPOCH_BYTES, 0)]
        return self._post(source, here, there, "DRAM", held, _Epochs(epochs, wanted))

    def close(self) -> None:
        self._peers.forget_all()
        self._buffers.forget_free()
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered = []

    def _post(
        self,
        source: SourceAddress,
        here: list[tuple[int, int, int]],
        there: list[tuple[int, int, int]],
        memory: str,
        held: ExitStack,
        epochs: _Epochs | None,
    ) -> _NixlRead:
        agent = self._agent
        # NIXL's errors have no common root but Exception.
        try:
            peer = self._peers.meet(source)
            held.callback(self._peers.leave, peer)
            local, remote = (agent.get_xfer_descs(np.array(d, dtype=np.uint64), memory) for d in (here, there))
            handle = agent.initialize_xfer("READ", local, remote, source.incarnation)
            held.callback(handle.release)
            first = agent.transfer(handle)
        except Exception as problem:
            self._peers.lose(source.incarnation)
            with suppress(Exception):
                held.close()
            raise TransferError(source.incarnation, f"NIXL could not start reading: {problem}") from None
        return _NixlRead(agent, handle, _STATUS[first], held, epochs, lambda: self._peers.lose(source.incarnation))


@dataclass(slots=True)
class _Peer:
    name: str
    num_reads: int = 0
    lost: bool = False


class _Peers:
    """The processes NIXL knows. One that broke is forgotten, but never while a read from it may still write here."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        # The one that was read from last comes last.
        self._known: OrderedDict[str, _Peer] = OrderedDict()

    def meet(self, source: SourceAddress) -> _Peer:
        """The process behind `source`, with one more read."""
        if source.incarnation not in self._known:
            self._agent.add_remote_agent(source.metadata)
            self._known[source.incarnation] = _Peer(source.incarnation)
            excess = max(0, len(self._known) - _MOST_PEERS)
            for old in [peer for peer in self._known.values() if not peer.num_reads][:excess]:
                self._forget(old)
        self._known.move_to_end(source.incarnation)
        peer = self._known[source.incarnation]
        peer.num_reads += 1
        return peer

    def leave(self, peer: _Peer) -> None:
        """One of its reads is over."""
        peer.num_reads -= 1
        if peer.lost and not peer.num_reads:
            self._forget(peer)

    def lose(self, name: str) -> None:
        """A read from it failed: it is forgotten once its last read is over."""
        if name in self._known:
            self._known[name].lost = True

    def forget_all(self) -> None:
        for peer in list(self._known.values()):
            self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        if self._known.pop(peer.name, None) is not None:
            # One that is already gone cannot be removed, and need not be.
            with suppress(Exception):
                self._agent.remove_remote_agent(peer.name)


class _EpochBuffers:
    """Registered memory that epochs are read into, used again: to register some for each read is slow, and may fail.

    A read has one to itself until it is over: one that never ends must not write into the next one's answer, nor into
    memory that was given back.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._all: dict[int, tuple[torch.Tensor, Any]] = {}
        self._free: list[torch.Tensor] = []

    def take(self, count: int) -> torch.Tensor:
        """One that holds `count` epochs or more."""
        fit = next((at for at, buffer in enumerate(self._free) if buffer.numel() >= count), None)
        if fit is not None:
            return self._free.pop(fit)
        buffer = torch.zeros(max(_LEAST_EPOCHS, 1 << (count - 1).bit_length()), dtype=torch.int64)
        self._all[buffer.data_ptr()] = (buffer, self._agent.register_memory([buffer]))
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)

    def forget_free(self) -> None:
        for buffer in self._free:
            self._agent.deregister_memory(self._all.pop(buffer.data_ptr())[1])
        self._free = []


@dataclass(frozen=True, slots=True)
class _Epochs:
    """Where a read puts them, and which are wanted."""

    buffer: torch.Tensor
    wanted: list[int]


class _NixlRead:
    def __init__(
        self,
        agent: Any,
        handle: Any,
        status: ReadStatus,
        held: ExitStack,
        epochs: _Epochs | None,
        on_failure: Callable[[], None],
    ) -> None:
        self._agent, self._handle, self._status = agent, handle, status
        self._held, self._epochs, self._on_failure = held, epochs, on_failure
        if status is ReadStatus.FAILED:
            on_failure()

    def status(self) -> ReadStatus:
        if self._status is ReadStatus.PENDING:
            try:
                self._status = _STATUS[self._agent.check_xfer_state(self._handle)]
            # A lost peer is raised, not returned: the transfer is over, without its bytes.
            except Exception:
                self._status = ReadStatus.FAILED
            if self._status is ReadStatus.FAILED:
                self._on_failure()
        return self._status

    def epochs(self) -> list[int]:
        assert self._epochs is not None, "this read fetched pages"
        return [int(self._epochs.buffer[at]) for at in self._epochs.wanted]

    def close(self) -> None:
        assert self._status is not ReadStatus.PENDING, "releasing a pending read does not stop it"
        self._held.close()


def adjacent_runs(remote: list[int], local: list[int]) -> list[tuple[int, int, int]]:
    """(remote, local, count) runs of pages that lie side by side on both ends: fewer, larger reads."""
    runs: list[tuple[int, int, int]] = []
    for there, here in zip(remote, local, strict=True):
        if runs and runs[-1][0] + runs[-1][2] == there and runs[-1][1] + runs[-1][2] == here:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((there, here, 1))
    return runs


def make_agent(name: str) -> Any:
    """A NIXL agent over UCX that takes no processor time while nothing travels.

    NIXL's Python tells the thread of every agent to wait 0 microseconds, which takes a whole core of an idle worker.
    It has no argument for it: the field of its config is written here.

    Raises TransferError when NIXL is not installed, cannot start or has no UCX.
    """
    try:
        with _logging_kept():
            from nixl import _api as nixl
    except ImportError as problem:
        raise TransferError(name, f"NIXL is not installed ({problem}); it comes with farspan on Linux") from None
    binding, plain = nixl.nixlBind, nixl.nixlBind.nixlAgentConfig

    class Waiting(plain):  # type: ignore[misc, valid-type]
        def __setattr__(self, field: str, value: Any) -> None:
            super().__setattr__(field, _LOOK_EVERY_US if field == "pthrDelay" else value)

    binding.nixlAgentConfig = Waiting
    try:
        agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))
    # NIXL's errors have no common root but Exception.
    except Exception as problem:
        raise TransferError(name, f"NIXL could not start: {problem}") from None
    finally:
        binding.nixlAgentConfig = plain
    if "UCX" not in agent.backends:
        raise TransferError(name, "this NIXL has no UCX backend")
    return agent


@contextmanager
def _logging_kept() -> Iterator[None]:
    """NIXL configures logging when it is imported, which closes the handlers of the whole process.

    Files open again by themselves; what buffers for a file loses it. Ray Serve's controller asks each replica for its
    log file when it starts again, and stops those that cannot say.
    """
    loggers = [
        logging.root,
        *(log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)),
    ]
    buffers = [handler for log in loggers for handler in log.handlers if isinstance(handler, MemoryHandler)]
    targets, raising = [buffer.target for buffer in buffers], logging.raiseExceptions
    try:
        yield
    finally:
        for buffer, target in zip(buffers, targets, strict=True):
            buffer.setTarget(target)
        logging.raiseExceptions = raising
