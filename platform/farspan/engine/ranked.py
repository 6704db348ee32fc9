"""Pages of an engine of several ranks on their way to another: each rank reads its own part from the same rank there.

What decides is the leader's: its epochs are those of every part of a page, because other ranks give a page new content
only when the leader's epoch has changed already. A page is whole when all parts are; its digest is made of theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from farspan.engine.follow import ADDRESS_NUMBERS, STATUSES
from farspan.engine.gang import Word
from farspan.engine.lead import Leader
from farspan.engine.orders import Fetch, read_sources, write_fetch
from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.ticket import SourceAddress
from farspan.kv.transports.base import EpochRead, Read, ReadStatus, Transport

# Other ranks are asked for all their reads at once, and not again within so long.
_POLL_S = 0.0005
_NOTHING = np.zeros(0, np.int64)


class RankedTransport:
    """`Transport` of all ranks. Called where the engine steps."""

    def __init__(
        self, own: Transport, leader: Leader, pool: PagePool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`own`: the leader's; the others open theirs now. From now on digests of the pool are those of whole pages.

        Raises TransferError when they opened another one.
        """
        self._own, self._leader, self._clock = own, leader, clock
        self.name = own.name
        told = leader.ask(Word.ADDRESS, _NOTHING, ADDRESS_NUMBERS)
        self._others = tuple(read_sources(numbers)[0] for numbers in told)
        if other := next((source.transport for source in self._others if source.transport != own.name), ""):
            reason = f"one rank of this worker speaks {other}, its leader {own.name}; set transfer.transport"
            raise TransferError(own.address().incarnation, reason)
        pool.join_digests(self._digests)
        self._num_fetches = 0
        self._open: dict[int, _RankedRead] = {}
        self._polled_at_s = -1.0

    def address(self) -> SourceAddress:
        return replace(self._own.address(), ranks=self._others)

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Read:
        if len(source.ranks) != len(self._others):
            raise TransferError(source.incarnation, f"the source has {len(source.ranks) + 1} ranks")
        # First its own: what cannot start here is not told, and writes nowhere.
        own = self._own.read_pages(source, remote, local)
        self._num_fetches += 1
        fetch = Fetch(self._num_fetches, source.ranks, remote, local)
        read = self._open[fetch.number] = _RankedRead(own, len(self._others), self._poll)
        self._leader.ask(Word.FETCH, write_fetch(fetch), 0)
        return read

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> EpochRead:
        return self._own.read_epochs(source, remote)

    def close(self) -> None:
        self._own.close()

    def _digests(self, pages: Sequence[int]) -> list[list[int]]:
        told = self._leader.ask(Word.DIGEST, np.array(pages, np.int64), len(pages))
        return [numbers.view(np.uint64).tolist() for numbers in told]

    def _poll(self) -> None:
        """Ask all other ranks for every read that is not over on each of them."""
        now_s = self._clock()
        if now_s - self._polled_at_s < _POLL_S:
            return
        self._polled_at_s = now_s
        numbers = list(self._open)
        told = self._leader.ask(Word.POLL, np.array(numbers, np.int64), len(numbers))
        for place, number in enumerate(numbers):
            self._open[number].others = [STATUSES[int(codes[place])] for codes in told]
            if ReadStatus.PENDING not in self._open[number].others:
                del self._open[number]


class _RankedRead:
    """One posted read on every rank: over when it is over on all of them."""

    def __init__(self, own: Read, num_others: int, poll: Callable[[], None]) -> None:
        self._own, self._poll = own, poll
        self.others = [ReadStatus.PENDING] * num_others

    def status(self) -> ReadStatus:
        own = self._own.status()
        if ReadStatus.PENDING in self.others:
            self._poll()
        statuses = {own, *self.others}
        # Also when one has failed: the others may still write.
        if ReadStatus.PENDING in statuses:
            return ReadStatus.PENDING
        return ReadStatus.FAILED if ReadStatus.FAILED in statuses else ReadStatus.DONE

    def close(self) -> None:
        self._own.close()
