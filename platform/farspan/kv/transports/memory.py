"""Pages between two pools of one process: the transport of tests and of a worker that does both roles."""

from __future__ import annotations

import uuid

from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.ticket import SourceAddress
from farspan.kv.transports.base import EpochRead, Read, ReadStatus


class MemoryNetwork:
    """Who is reachable. Two transports see each other when they share one network."""

    def __init__(self) -> None:
        self.pools: dict[str, PagePool] = {}


class _Copy:
    """A read that ended when it was posted."""

    def __init__(self, epochs: list[int]) -> None:
        self._epochs = epochs

    def status(self) -> ReadStatus:
        return ReadStatus.DONE

    def epochs(self) -> list[int]:
        return self._epochs

    def close(self) -> None:
        return None


class MemoryTransport:
    name = "memory"

    def __init__(self, pool: PagePool, network: MemoryNetwork) -> None:
        self._pool, self._network = pool, network
        self._incarnation = uuid.uuid4().hex
        network.pools[self._incarnation] = pool

    def address(self) -> SourceAddress:
        return SourceAddress(self.name, self._incarnation, b"", 0, 0, self._pool.num_pages)

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Read:
        self._pool.storage_PB[local] = self._source(source).storage_PB[remote]
        return _Copy([])

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> EpochRead:
        return _Copy(self._source(source).epochs_P[remote].tolist())

    def close(self) -> None:
        self._network.pools.pop(self._incarnation, None)

    def _source(self, source: SourceAddress) -> PagePool:
        if source.incarnation not in self._network.pools:
            raise TransferError(source.incarnation, "the worker that offered the pages is gone")
        return self._network.pools[source.incarnation]
