"""A small world in which everything can happen to transfers of KV pages, one event at a time.

The pools, the lease table and the puller are the real ones. Only the wire is played: a read that was posted lands,
lands with a wrong bit, or breaks when an event says so, also long after everybody stopped waiting for it. What lands
are the bytes that lie in the source at that moment, whoever they belong to by then.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from farspan.errors import TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvOffer, KvTicket, LeaseTable, SourceAddress
from farspan.kv.transports.base import ReadStatus

LAYOUT = KvLayout.uniform(
    model="m", num_layers=1, num_kv_heads=1, k_head_dim=4, v_head_dim=4, dtype="float32", page_tokens=1
)
DEADLINE_S, LEASE_S = 5.0, 20.0
STRANGER = 251


@dataclass(eq=False)
class Posted:
    """A read under way."""

    pool: PagePool
    remote: list[int]
    local: list[int]
    """Empty: epochs are read."""
    now: ReadStatus = ReadStatus.PENDING
    found: list[int] = field(default_factory=list)

    def status(self) -> ReadStatus:
        return self.now

    def epochs(self) -> list[int]:
        assert self.now is ReadStatus.DONE
        return self.found

    def close(self) -> None:
        assert self.now is not ReadStatus.PENDING, "released while it may still write"


@dataclass
class Source:
    """One start of the process that offers."""

    incarnation: str
    pool: PagePool
    leases: LeaseTable
    held: dict[int, list[int]] = field(default_factory=dict)
    """Pages of prompts that are still computed."""
    tickets: dict[int, KvTicket] = field(default_factory=dict)

    @property
    def address(self) -> SourceAddress:
        return SourceAddress("wire", self.incarnation, b"", 0, 0, self.pool.num_pages)


@dataclass(frozen=True)
class Scale:
    """How large the world is, and how often each rare thing may happen."""

    parts: tuple[tuple[int, ...], ...] = ((1, 1),)
    """Pages of each part of each request; the last ones come with its ticket."""
    source_pages: int = 3
    receiver_pages: int = 4
    rare: int = 1
    mischief: tuple[str, ...] = ("lose", "crash", "late", "expire", "again", "cancel", "claim", "flip", "break")


class World:
    def __init__(self, scale: Scale, puller: type[Puller] = Puller) -> None:
        self.scale = scale
        self.receiver = PagePool(LAYOUT, scale.receiver_pages * LAYOUT.page_bytes)
        self.name = "wire"
        self.puller = puller(self.receiver, self, DEADLINE_S, part_bytes=2 * LAYOUT.page_bytes)
        self.posted: list[Posted] = []
        self.now_s = 0.0
        self.source = self._new_source(0)
        self.phase = [0] * len(scale.parts)
        """Parts of each request that are computed."""
        self.lives = [0] * len(scale.parts)
        self.last_offer: dict[int, KvOffer] = {}
        self.done: dict[int, list[int] | str] = {}
        """Pages each request was given, or why it got none."""
        self.claimed: list[int] = []
        self.left = dict.fromkeys(scale.mischief, scale.rare)

    # What the puller sees of the wire.

    def read_pages(self, source: SourceAddress, remote: list[int], local: list[int]) -> Posted:
        return self._post(source, remote, local)

    def read_epochs(self, source: SourceAddress, remote: list[int]) -> Posted:
        return self._post(source, remote, [])

    def _post(self, source: SourceAddress, remote: list[int], local: list[int]) -> Posted:
        if source.incarnation != self.source.incarnation:
            raise TransferError(source.incarnation, "the worker that offered the pages is gone")
        self.posted.append(Posted(self.source.pool, list(remote), list(local)))
        return self.posted[-1]

    # What can happen next.

    def events(self) -> Iterator[tuple[str, int]]:
        for request, parts in enumerate(self.scale.parts):
            if self.phase[request] < len(parts) and request not in self.done and self._has_room(request):
                yield "compute", request
            yield from self._mischief(request, parts)
        for number, read in enumerate(self.posted):
            if read.pool is self.source.pool:
                yield "land", number
                if read.local:
                    yield from self._rarely("flip", number)
                yield from self._rarely("break", number)
            else:
                yield "break", number
        for kind in ("crash", "late", "expire"):
            yield from self._rarely(kind, 0)
        if self.claimed:
            yield "unclaim", 0
        elif self.receiver.num_free:
            yield from self._rarely("claim", 0)

    def _mischief(self, request: int, parts: tuple[int, ...]) -> Iterator[tuple[str, int]]:
        if self.phase[request] > 0:
            yield from self._rarely("lose", request)
        if request in self.last_offer:
            yield from self._rarely("again", request)
        if request not in self.done:
            yield from self._rarely("cancel", request)

    def _rarely(self, kind: str, argument: int) -> Iterator[tuple[str, int]]:
        if self.left.get(kind, 0) > 0:
            yield kind, argument

    def _has_room(self, request: int) -> bool:
        return self.source.pool.num_free >= self.scale.parts[request][self.phase[request]]

    def happen(self, kind: str, argument: int) -> None:
        """One event, then what the engine's thread does on its next turn, then every check."""
        if kind in self.left and not (kind == "break" and self.posted[argument].pool is not self.source.pool):
            self.left[kind] -= 1
        getattr(self, f"_{kind}")(argument)
        for arrival in self.puller.poll(self.now_s):
            request = int(arrival.ticket.request_id)
            assert request not in self.done, "a request was answered twice"
            self.done[request] = arrival.pages if arrival.pages is not None else str(arrival.error)
        self.check()

    def _compute(self, request: int) -> None:
        source, parts = self.source, self.scale.parts[request]
        fresh = source.pool.alloc(parts[self.phase[request]]) or []
        pages = source.held.setdefault(request, [])
        for page in fresh:
            source.pool.storage_PB[page] = content(request, len(pages))
            pages.append(page)
        self.phase[request] += 1
        if self.phase[request] == len(parts):
            self._hand_out(request)
            return
        offer = source.leases.grow(str(request), self.lives[request], pages, sum(parts), source.address, self.now_s)
        assert offer is not None
        self.last_offer[request] = offer
        self.puller.follow(offer, 0, self.now_s, self.now_s)

    def _hand_out(self, request: int) -> None:
        source, pages = self.source, self.source.held.pop(request)
        ticket = source.leases.offer(str(request), pages, len(pages), source.address, self.now_s)
        source.tickets[request] = ticket
        try:
            if self.puller.complete(ticket, self.now_s, self.now_s):
                return
            local = self.receiver.alloc(len(pages))
            if local is None:
                self.done[request] = "no room"
                return
            try:
                self.puller.start(ticket, local, self.now_s, self.now_s)
            except TransferError:
                self.receiver.free(local)
                raise
        except TransferError as problem:
            self.done[request] = str(problem)

    def _lose(self, request: int) -> None:
        """The source gives pages away: it began again, or let a ticket go; strangers write into them."""
        if request in self.source.held:
            self.source.pool.free(self.source.held.pop(request))
            self.phase[request], self.lives[request] = 0, self.lives[request] + 1
        elif request in self.source.tickets:
            self.source.leases.release(self.source.tickets[request].ticket_id)
        self._scribble()

    def _scribble(self) -> None:
        taken = self.source.pool.alloc(self.source.pool.num_free) or []
        for page in taken:
            self.source.pool.storage_PB[page] = STRANGER
        self.source.pool.free(taken)

    def _crash(self, _: int) -> None:
        self.source = self._new_source(int(self.source.incarnation) + 1)
        for request, parts in enumerate(self.scale.parts):
            if self.phase[request] < len(parts):
                self.phase[request] = 0

    def _new_source(self, number: int) -> Source:
        pool = PagePool(LAYOUT, self.scale.source_pages * LAYOUT.page_bytes)
        return Source(str(number), pool, LeaseTable(pool, LEASE_S))

    def _again(self, request: int) -> None:
        self.puller.follow(self.last_offer[request], 0, self.now_s, self.now_s)

    def _cancel(self, request: int) -> None:
        self.puller.abandon(str(request))
        self.done[request] = "cancelled"

    def _late(self, _: int) -> None:
        self.now_s += DEADLINE_S

    def _expire(self, _: int) -> None:
        self.now_s += LEASE_S
        self.source.leases.expire(self.now_s)
        self._scribble()

    def _claim(self, _: int) -> None:
        """Somebody else at the receiver takes every page that is free, and relies on what they write there."""
        self.claimed = self.receiver.alloc(self.receiver.num_free) or []
        self.receiver.storage_PB[self.claimed] = STRANGER - 1

    def _unclaim(self, _: int) -> None:
        self.receiver.free(self.claimed)
        self.claimed = []

    def _land(self, number: int) -> None:
        read = self.posted.pop(number)
        if read.local:
            self.receiver.storage_PB[read.local] = read.pool.storage_PB[read.remote]
        else:
            read.found = read.pool.epochs_P[read.remote].tolist()
        read.now = ReadStatus.DONE

    def _flip(self, number: int) -> None:
        read = self.posted[number]
        self._land(number)
        self.receiver.storage_PB[read.local[-1], 3] ^= 16

    def _break(self, number: int) -> None:
        """It ends without success, after some of its bytes came."""
        read = self.posted.pop(number)
        for page in read.local[:1]:
            self.receiver.storage_PB[page] = STRANGER - 2
        read.now = ReadStatus.FAILED

    # What must hold, always and in the end.

    def check(self) -> None:
        pool = self.receiver
        pool.check_integrity()
        self.source.pool.check_integrity()
        assert pool.num_free + pool.num_held + pool.num_quarantined == pool.num_pages
        given = [page for pages in self.done.values() if not isinstance(pages, str) for page in pages]
        outside = [Owned("answers", given), Owned("somebody else", self.claimed)]
        assert pool.forgotten((*outside, *self.puller.owned())) == []
        computed = (Owned(str(request), pages) for request, pages in self.source.held.items())
        assert self.source.pool.forgotten((*computed, *self.source.leases.owned(0.0))) == []
        owned = [*given, *self.claimed]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert all(pool.holders(page) == 1 for page in owned), "a page that was given is not held"
        for request, pages in self.done.items():
            if not isinstance(pages, str):
                assert len(pages) == sum(self.scale.parts[request])
                for place, page in enumerate(pages):
                    assert (pool.storage_PB[page] == content(request, place)).all(), "foreign bytes in an answer"
        assert (pool.storage_PB[self.claimed] == STRANGER - 1).all(), "somebody's page was written from outside"
        writable = {page for read in self.posted for page in read.local}
        assert not writable & set(owned), "a read that may still land points into a page somebody owns"

    def end(self) -> None:
        """Everything that is under way ends, and everybody goes: not a page may be missing."""
        while self.posted:
            self.happen("break" if len(self.posted) % 2 or self.posted[0].pool is not self.source.pool else "land", 0)
        for request, pages in list(self.done.items()):
            if not isinstance(pages, str):
                self.receiver.free(pages)
            self.done[request] = "gone"
        if self.claimed:
            self._unclaim(0)
        self.now_s += 10 * LEASE_S
        self.puller.poll(self.now_s)
        self.source.leases.expire(self.now_s)
        for pages in self.source.held.values():
            self.source.pool.free(pages)
        assert self.receiver.num_free == self.receiver.num_pages, "the receiver lost pages"
        assert self.source.pool.num_free == self.source.pool.num_pages, "the source lost pages"

    def fork(self) -> World:
        """The same world once more. What never changes is shared."""
        handed = [*self.last_offer.values(), *self.source.tickets.values(), *(p.ticket for p in self.puller._pulls)]
        fixed = [LAYOUT, self.scale, self.receiver.device, self.source.pool.device, self.source.pool.layout]
        for one in handed:
            fixed += [one] if one is None else [one, one.source, *one.pages]
        shared: dict[int, object] = {id(one): one for one in fixed}
        pools = {id(pool): pool for pool in (self.receiver, self.source.pool, *(read.pool for read in self.posted))}
        return copy.deepcopy(self, shared | {known: _twin(pool) for known, pool in pools.items()})

    def key(self) -> bytes:
        """Equal for worlds with the same future."""
        pulls = {p.request_id: p for p in self.puller._pulls}
        parts = [(str(part.transfer.state), part.deadline_s, part.pages) for p in pulls.values() for part in p.parts]
        told = [
            (p.request_id, p.ticket is None, p.until_s, p.source.incarnation, len(p.refs), p.pages)
            for p in pulls.values()
        ]
        offers = [
            (r, o.source.incarnation, o.lease_until_s, str(r) in pulls and pulls[str(r)].ticket_id == o.ticket_id)
            for r, o in sorted(self.last_offer.items())
        ]
        reads = [(r.remote, r.local, r.pool is self.source.pool) for r in self.posted]
        late = [(part.pages, part.is_over) for part in self.puller._quarantined]
        pools = [
            (p.storage_PB.numpy().tobytes(), p.epochs_P.tolist(), p._holders, sorted(p._quarantined))
            for p in (self.receiver, self.source.pool)
        ]
        leases = [(r, t.lease_until_s) for r, t in sorted(self.source.tickets.items())]
        source = (self.source.incarnation, self.source.held, leases, self.source.leases.num_open)
        mine = (self.phase, self.done, self.claimed, self.left, self.now_s)
        return hashlib.sha256(repr((parts, told, offers, reads, late, pools, source, mine)).encode()).digest()


def _twin(pool: PagePool) -> PagePool:
    """A copy without the views by layer, which nobody asks for here: they take longest to copy."""
    twin = copy.copy(pool)
    twin.storage_PB, twin.epochs_P = pool.storage_PB.clone(), pool.epochs_P.clone()
    twin._keys, twin._values = {}, {}
    for name in ("_holders", "_quarantined", "_findable", "_idle", "_free"):
        setattr(twin, name, copy.copy(getattr(pool, name)))
    return twin


def content(request: int, place: int) -> int:
    """The byte that fills a page of a request."""
    return 1 + request * 16 + place


def explore(scale: Scale, puller: type[Puller] = Puller, most: int = 10**9) -> tuple[int, int]:
    """Every order of events, to its end; (worlds, events) that were seen."""
    first = World(scale, puller)
    seen, ahead, num_events = {first.key()}, [first], 0
    while ahead:
        world = ahead.pop()
        choices = list(world.events())
        for kind, argument in choices:
            then = world.fork()
            then.happen(kind, argument)
            num_events += 1
            if (key := then.key()) not in seen:
                seen.add(key)
                ahead.append(then)
        if not any(kind in ("compute", "land", "break", "unclaim") for kind, _ in choices):
            world.end()
        assert len(seen) < most, "the world is larger than was thought"
    return len(seen), num_events


def wander(scale: Scale, num_events: int, seed: int, world_type: type[World] = World) -> dict[str, int]:
    """One long order of events, drawn; how many of each kind happened."""
    draw, counts = random.Random(seed), dict[str, int]()
    world = world_type(scale)
    for _ in range(num_events):
        choices = list(world.events())
        if not choices:
            world.end()
            world = world_type(scale)
            continue
        kind, argument = draw.choice(choices)
        world.happen(kind, argument)
        counts[kind] = counts.get(kind, 0) + 1
    world.end()
    return counts
