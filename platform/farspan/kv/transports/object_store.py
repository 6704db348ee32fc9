"""Pages between processes as objects of a store: where NIXL is missing, or a config asks for it.

A source copies pages out and puts their bytes into the store when it is asked for them; the receiver gets the object
and copies it into its pages.

Only `status` writes pages, and only before it has said how the read ended: in the thread that owns the pool, which
also decides whose a page is. Bytes that come after the deadline find nobody who would copy them. So a read always
ends by its deadline, and the pages of a late one are free again at the next look.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol

import numpy as np
import torch

from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.ticket import SourceAddress
from farspan.kv.transports.base import EpochRead, Read, ReadStatus


class PageSource:
    """What others may have of a pool. Called in the threads of an exchange, while the pool is used."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.incarnation = uuid.uuid4().hex

    def copy_pages(self, pages: list[int]) -> bytes:
        """Their bytes as they lie there now. Raises TransferError when there is no such page."""
        self._refuse_unknown(pages)
        return self._pool.storage_PB[pages].cpu().numpy().tobytes()

    def epochs(self, pages: list[int]) -> list[int]:
        """Their epochs as they are now. Raises TransferError when there is no such page."""
        self._refuse_unknown(pages)
        return [self._pool.epoch(page) for page in pages]

    def _refuse_unknown(self, pages: list[int]) -> None:
        # A negative number would name another page.
        if not all(0 <= page < self._pool.num_pages for page in pages):
            raise TransferError(self.incarnation, f"there are pages 0..{self._pool.num_pages - 1}, not {pages}")


class Exchange(Protocol):
    """How processes ask each other for bytes, by the incarnation of the one that has them.

    Its futures end in threads of its own: within `within_s`, with TransferError where nothing comes. One that is
    cancelled leaves nothing in the store.
    """

    def ask_pages(self, source: str, pages: list[int], within_s: float) -> Future[bytes]: ...

    def ask_epochs(self, source: str, pages: list[int], within_s: float) -> Future[list[int]]: ...

    def close(self) -> None:
        """Answer nobody any more."""
        ...


class ObjectTransport:
    name = "object_store"

    def __init__(
        self,
        pool: PagePool,
        open_exchange: Callable[[PageSource], Exchange],
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A read ends within `deadline_s`. Raises what `open_exchange` raises."""
        self._pool, self._deadline_s, self._clock = pool, deadline_s, clock
        self._source = PageSource(pool)
        self._exchange = open_exchange(self._source)

    def address(self) -> SourceAddress:
        return SourceAddress(self.name, self._source.incarnation, b"", 0, 0, self._pool.num_pages)

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Read:
        answer = self._exchange.ask_pages(source.incarnation, remote, self._deadline_s)
        return _ObjectRead(answer, lambda got: self._take(got, local), self._ends_s(), self._clock)

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> EpochRead:
        answer = self._exchange.ask_epochs(source.incarnation, remote, self._deadline_s)
        return _ObjectEpochs(answer, len(remote), self._ends_s(), self._clock)

    def close(self) -> None:
        self._exchange.close()

    def _ends_s(self) -> float:
        return self._clock() + self._deadline_s

    def _take(self, got: Any, local: list[int]) -> bool:
        """Copy what came into local pages; false: it is not what was asked for."""
        size = self._pool.layout.page_bytes
        if not isinstance(got, bytes) or len(got) != len(local) * size:
            return False
        rows_PB = np.frombuffer(got, np.uint8).reshape(len(local), size)
        # A copy: torch takes no memory that must not be written.
        self._pool.storage_PB[local] = torch.tensor(rows_PB, device=self._pool.device)
        return True


class _ObjectRead:
    """Something that was asked for, and what is done with it when it comes in time."""

    def __init__(
        self, answer: Future[Any], take: Callable[[Any], bool], ends_s: float, clock: Callable[[], float]
    ) -> None:
        self._answer: Future[Any] | None = answer
        self._take, self._ends_s, self._clock = take, ends_s, clock
        self._status = ReadStatus.PENDING

    def status(self) -> ReadStatus:
        if self._answer is not None:
            self._status = self._look(self._answer)
            if self._status is not ReadStatus.PENDING:
                self._answer.cancel()
                # With it go the bytes, or the reference to them.
                self._answer = None
        return self._status

    def _look(self, answer: Future[Any]) -> ReadStatus:
        if not answer.done():
            return ReadStatus.PENDING if self._clock() < self._ends_s else ReadStatus.FAILED
        try:
            return ReadStatus.DONE if self._take(answer.result()) else ReadStatus.FAILED
        except (TransferError, CancelledError):
            return ReadStatus.FAILED

    def close(self) -> None:
        assert self._answer is None, "nobody would end this read"


class _ObjectEpochs(_ObjectRead):
    def __init__(self, answer: Future[Any], count: int, ends_s: float, clock: Callable[[], float]) -> None:
        super().__init__(answer, self._keep, ends_s, clock)
        self._count, self._epochs = count, list[int]()

    def epochs(self) -> list[int]:
        return self._epochs

    def _keep(self, got: Any) -> bool:
        self._epochs = got
        return isinstance(got, list) and len(got) == self._count
