"""Full pages on their way between a pool and the blocks outside of it: copied out behind the computing, fetched ahead.

One thread moves; the engine's own thread never waits for it. A page is copied out without being held: its epoch tells
whether it was given away meanwhile. A page that comes back is an idle page, found like any other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from farspan.kv.host_cache import BATCH_BLOCKS, BlockCache, Source
from farspan.kv.host_index import HostCounts, HostUse
from farspan.kv.host_link import HostLink
from farspan.kv.layout import GONE
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool
from farspan.kv.prefix import PrefixCache, PrefixChain
from farspan.memory.transfer import ThreadLane

# A sequence that waited so long for its blocks goes on without them.
PATIENCE_S = 1.0
# What a look into the index takes is worth waiting for: otherwise a whole iteration would go by.
_LOOK_S = 0.002
# A job ends by itself, because every call of a cache does.
_JOB_S = 60.0
# Pages that wait to be copied out; when computing is faster than copying, the newest are not kept.
_MOST_WAITING = 16_384
_OWNER = "what is fetched from host memory"


class _Page(NamedTuple):
    """A full page that is to be copied out, as long as its epoch stays."""

    chain: PrefixChain
    place: int
    group: int
    page: int
    epoch: int


@dataclass(eq=False, slots=True)
class _Fetch:
    """Pages that are being filled."""

    chain: PrefixChain
    tokens: Sequence[int]
    wanted: list[tuple[int, int]]
    """(place, group) of each page."""
    names: frozenset[bytes]
    pages: list[int]
    kept: list[int]
    """Pages of the same beginning that are there already, and must not make room for the others."""
    arrived: list[bool] = field(default_factory=list)
    over: bool = False


@dataclass(eq=False, slots=True)
class _Search:
    """A sequence that waits, and what is known of its beginning."""

    chain: PrefixChain
    tokens: Sequence[int]
    most: int
    since_s: float | None = None
    """When it was first kept from going on."""
    present: list[list[bool]] = field(default_factory=list)
    """For each place, in which groups its block is outside."""
    known: bool = False
    fetch: _Fetch | None = None


class HostTraffic:
    """Between one pool with its prefix cache and one block cache."""

    def __init__(
        self, pool: PagePool, prefix: PrefixCache, open_cache: Callable[[], BlockCache], clock: Callable[[], float]
    ) -> None:
        """`open_cache` is called again when the cache is lost; where it raises TierError there is none for now."""
        self._pool, self._prefix, self._clock = pool, prefix, clock
        self._link = HostLink(open_cache)
        self._lane = ThreadLane("host-cache", 1)
        self._searches: dict[str, _Search] = {}
        self._fetches: list[_Fetch] = []
        self._waiting: deque[_Page] = deque()
        self._sending = False
        self._sent = threading.Condition()
        self._news = threading.Event()
        self._kept = self._fetched = self._passed_over = 0

    @property
    def num_seeking(self) -> int:
        """Sequences that wait and may find more than the pool has."""
        return len(self._searches)

    @property
    def _is_looking(self) -> bool:
        return not all(search.known for search in self._searches.values())

    @property
    def num_fetching(self) -> int:
        """Pages that are being filled, and held until they are."""
        return sum(len(fetch.pages) for fetch in self._fetches)

    def owned(self) -> Iterator[Owned]:
        """What is held until pages are filled."""
        for fetch in self._fetches:
            yield Owned(_OWNER, [*fetch.kept, *fetch.pages])

    @property
    def use(self) -> HostUse:
        link = self._link
        return HostUse(self._kept, self._fetched, link.num_corrupt, self._passed_over, bool(link.lost))

    def keep(self, chain: PrefixChain, places: range, table: Sequence[int]) -> None:
        """Copy the full pages of these places of a sequence out, as far as nobody did before."""
        size = self._pool.layout.num_groups
        pages = table[places.start * size : places.stop * size]
        held = [(number, page) for number, page in enumerate(pages) if page != GONE]
        if not held or not self._is_there():
            return
        epochs = self._pool.epochs_P[[page for _, page in held]].tolist()
        parts = [
            _Page(chain, places.start + number // size, number % size, page, epoch)
            for (number, page), epoch in zip(held, epochs, strict=True)
        ]
        with self._sent:
            if len(self._waiting) >= _MOST_WAITING:
                self._passed_over += len(parts)
                return
            self._waiting.extend(parts)
            self._send()

    def seek(self, request_id: str, chain: PrefixChain, tokens: Sequence[int]) -> None:
        """A sequence begins to wait: find out what of it is outside."""
        # The last token is always computed.
        most = len(tokens) - 1
        num_places = most // chain.page_tokens
        if not num_places or not self._is_there() or chain.name(num_places - 1, tokens) is None:
            return
        search = self._searches[request_id] = _Search(chain, tokens, most)
        groups = range(self._pool.layout.num_groups)
        names = [chain.block(place, group).name for place in range(num_places) for group in groups]

        def job() -> None:
            size, found = len(groups), self._link.call(lambda cache: cache.find(names))
            search.present = [found[start : start + size] for start in range(0, len(found), size)]
            search.known = True
            self._news.set()

        self._submit(job, f"looking for {len(names)} blocks")

    def forget(self, request_id: str) -> None:
        """The sequence waits no more; pages on their way come in all the same."""
        self._searches.pop(request_id, None)

    def holds_back(self, request_id: str) -> bool:
        """Whether a waiting sequence should stay out for now, because pages of it are on their way.

        Begins to fetch them where the pool has room.
        """
        search = self._searches.get(request_id)
        if search is None:
            return False
        now_s = self._clock()
        if self._link.lost or (search.since_s is not None and now_s - search.since_s > PATIENCE_S):
            self.forget(request_id)
            return False
        coming = not search.known or search.fetch is not None or self._begin(request_id, search)
        if coming and search.since_s is None:
            search.since_s = now_s
        return coming

    def _begin(self, request_id: str, search: _Search) -> bool:
        """Fetch what is outside, if there is anything and room for it; false: it cannot be waited for."""
        missing, there = self._prefix.missing(search.chain, search.tokens, search.most, search.present)
        if not missing:
            self.forget(request_id)
            return False
        names = [search.chain.block(place, group).name for place, group in missing]
        if any(not fetch.names.isdisjoint(names) for fetch in self._fetches):
            # On their way for somebody else: they are found when they are there.
            return True
        idle = sum(self._pool.holders(page) == 0 for page in there)
        if len(missing) + idle > self._pool.num_free:
            return False
        search.fetch = self._fetch(search, missing, names, there)
        return True

    def land(self) -> None:
        """Let others find the pages that came back; those that did not are free again."""
        until_s = time.monotonic() + _LOOK_S
        while self._is_looking and (left_s := until_s - time.monotonic()) > 0:
            self._news.wait(left_s)
            self._news.clear()
        self._news.clear()
        landed = [fetch for fetch in self._fetches if fetch.over]
        self._fetches = [fetch for fetch in self._fetches if fetch not in landed]
        for fetch in landed:
            self._land(fetch)

    def wait(self, seconds: float) -> None:
        """Until something is known or came back since `land`, at most so long."""
        self._news.wait(seconds)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that was to be kept is kept; false: it took too long."""
        with self._sent:
            return self._sent.wait_for(lambda: not self._sending, timeout_s)

    def counts(self) -> HostCounts | None:
        """What the whole cache holds; none: it is lost. Waits for the answer: not for the engine's thread."""
        return self._link.counts()

    def _fetch(self, search: _Search, missing: list[tuple[int, int]], names: list[bytes], there: list[int]) -> _Fetch:
        self._pool.retain(there, _OWNER)
        pages = self._pool.alloc(len(missing), _OWNER)
        assert pages is not None, "there was room for them"
        fetch = _Fetch(search.chain, search.tokens, missing, frozenset(names), pages, there)
        targets = [self._pool.storage_PB[page] for page in pages]

        def job() -> None:
            fetch.arrived = self._link.call(lambda cache: cache.fetch(names, targets))
            fetch.over = True
            self._news.set()

        self._fetches.append(fetch)
        self._submit(job, f"fetching {len(names)} blocks")
        return fetch

    def _land(self, fetch: _Fetch) -> None:
        come: dict[int, dict[int, int]] = {}
        # Nothing arrived from a cache that is lost.
        for (place, group), page, arrived in zip(fetch.wanted, fetch.pages, fetch.arrived, strict=False):
            if arrived:
                self._fetched += 1
                come.setdefault(place, {})[group] = page
        for place, pages in come.items():
            self._prefix.restore(fetch.chain, fetch.tokens, place, pages)
        self._pool.free([*fetch.kept, *fetch.pages])
        for request_id in [name for name, search in self._searches.items() if search.fetch is fetch]:
            self.forget(request_id)

    def _send(self) -> None:
        """Copy one batch out, then the next; whoever else wants the thread comes in between."""
        if not self._sending:
            self._sending = True
            self._submit(self._drain, "storing blocks")

    def _drain(self) -> None:
        with self._sent:
            batch = [self._waiting.popleft() for _ in range(min(BATCH_BLOCKS, len(self._waiting)))]
        self._link.call(lambda cache: self._store(cache, batch))
        with self._sent:
            self._sending = False
            if self._link.lost:
                self._waiting.clear()
            if self._waiting:
                self._send()
            self._sent.notify_all()

    def _store(self, cache: BlockCache, batch: list[_Page]) -> list[bool]:
        self._kept += cache.store([self._source(page) for page in batch])
        return []

    def _source(self, kept: _Page) -> Source:
        epochs_P, page = self._pool.epochs_P, kept.page
        block = kept.chain.block(kept.place, kept.group)
        return Source(block, self._pool.storage_PB[page], lambda: int(epochs_P[page]) == kept.epoch)

    def _is_there(self) -> bool:
        """Whether there is a cache now; one that was lost is looked for from time to time."""
        if self._link.is_due(time.monotonic()):
            self._submit(self._link.join, "joining the host cache")
        return not self._link.lost

    def _submit(self, job: Callable[[], None], what: str) -> None:
        self._lane.submit(job, what, _JOB_S)
