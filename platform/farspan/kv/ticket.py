"""What a prefill worker hands out so that another worker can fetch KV pages, and the leases behind it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool


@dataclass(frozen=True, slots=True)
class SourceAddress:
    """How to reach the pages of one worker process."""

    transport: str
    incarnation: str
    """Fresh for every process start: a restarted worker is somebody else."""
    metadata: bytes
    """Whatever the transport needs to connect."""
    pages_address: int
    epochs_address: int
    num_pages: int
    ranks: tuple[SourceAddress, ...] = ()
    """Of the other ranks that hold a part of every page, in their order; epochs are read here."""


@dataclass(frozen=True, slots=True)
class PageRef:
    """One page as it was when it was offered."""

    page: int
    epoch: int
    digest: int


@dataclass(frozen=True, slots=True)
class KvTicket:
    """The right to fetch the KV of one prompt until `lease_until_s`. Plain values: it travels between processes.

    Where the model keeps a recurrent state, the last pages hold it.
    """

    ticket_id: str
    request_id: str
    source: SourceAddress
    pages: tuple[PageRef, ...]
    num_tokens: int
    layout: str
    """Fingerprint of the source's layout."""
    page_bytes: int
    lease_until_s: float
    """Unix time."""
    adapter: str = ""
    """Digest of the adapter it was computed with; empty: the model alone."""

    @property
    def num_bytes(self) -> int:
        return len(self.pages) * self.page_bytes

    @property
    def digest(self) -> str:
        """Of all that its pages hold, in their order: 16 hex digits, the same for the same bytes wherever they lie."""
        return f"{xxhash.xxh3_64_intdigest(b''.join(ref.digest.to_bytes(8, 'little') for ref in self.pages)):016x}"


@dataclass(frozen=True, slots=True)
class KvOffer:
    """Pages of a prompt that is still computed, to be fetched before its ticket comes: full ones, which never change.

    A ticket names, in the same order, everything that was offered under its id. A prompt whose pages were lost on the
    way is offered from the beginning under another id.
    """

    ticket_id: str
    request_id: str
    source: SourceAddress
    first: int
    """Pages that were offered before these."""
    pages: tuple[PageRef, ...]
    num_tokens: int
    """Of the whole prompt."""
    layout: str
    page_bytes: int
    lease_until_s: float
    """Unix time. Whoever has heard nothing more by then waits in vain."""


@dataclass(slots=True)
class _Growing:
    """What was offered of a prompt so far."""

    life: int
    ticket_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    refs: list[PageRef] = field(default_factory=list)


class LeaseTable:
    """Pages held for tickets that were handed out and not yet given back."""

    def __init__(self, pool: PagePool, lease_s: float) -> None:
        self._pool, self._lease_s = pool, lease_s
        self._open: dict[str, KvTicket] = {}
        self._growing: dict[str, _Growing] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def grow(
        self,
        request_id: str,
        life: int,
        pages: Sequence[int],
        num_tokens: int,
        source: SourceAddress,
        now_s: float,
    ) -> KvOffer | None:
        """What is new among the full `pages` of a prompt that is still computed, or None. They stay their holder's.

        `life` changes whenever the holder gave them all back and began again.
        """
        growing = self._growing.get(request_id)
        if growing is None or growing.life != life:
            growing = self._growing[request_id] = _Growing(life)
        first = len(growing.refs)
        if len(pages) <= first:
            return None
        growing.refs += self._refs(pages[first:])
        return KvOffer(
            ticket_id=growing.ticket_id,
            request_id=request_id,
            source=source,
            first=first,
            pages=tuple(growing.refs[first:]),
            num_tokens=num_tokens,
            layout=self._pool.layout.fingerprint(),
            page_bytes=self._pool.layout.whole_page_bytes,
            lease_until_s=now_s + self._lease_s,
        )

    def forget(self, request_id: str) -> None:
        """Nothing more of this prompt will be offered; harmless when nothing was."""
        self._growing.pop(request_id, None)

    def offer(
        self,
        request_id: str,
        pages: list[int],
        num_tokens: int,
        source: SourceAddress,
        now_s: float,
        adapter: str = "",
    ) -> KvTicket:
        """A ticket for `pages`, whose holder becomes the lease.

        It goes on with what `grow` offered of the request, if these are still the same pages.
        """
        growing = self._growing.pop(request_id, None)
        held = [(page, self._pool.epoch(page)) for page in pages]
        if growing is None or [(ref.page, ref.epoch) for ref in growing.refs] != held[: len(growing.refs)]:
            growing = _Growing(0)
        ticket = KvTicket(
            ticket_id=growing.ticket_id,
            request_id=request_id,
            source=source,
            pages=(*growing.refs, *self._refs(pages[len(growing.refs) :])),
            num_tokens=num_tokens,
            layout=self._pool.layout.fingerprint(),
            page_bytes=self._pool.layout.whole_page_bytes,
            lease_until_s=now_s + self._lease_s,
            adapter=adapter,
        )
        self._open[ticket.ticket_id] = ticket
        self._pool.hand(pages, _owner(ticket))
        return ticket

    def release(self, ticket_id: str) -> bool:
        """Give the pages of a ticket back; false when there is no such open ticket (releasing twice is harmless)."""
        ticket = self._open.pop(ticket_id, None)
        if ticket is None:
            return False
        self._pool.free([ref.page for ref in ticket.pages])
        return True

    def expire(self, now_s: float) -> list[str]:
        """Release every ticket whose time is over, and name them."""
        over = [ticket_id for ticket_id, ticket in self._open.items() if ticket.lease_until_s <= now_s]
        for ticket_id in over:
            self.release(ticket_id)
        return over

    def owned(self, now_s: float) -> Iterator[Owned]:
        """What open tickets hold; one whose time is over owns nothing any more."""
        for ticket in self._open.values():
            if ticket.lease_until_s > now_s:
                yield Owned(_owner(ticket), [ref.page for ref in ticket.pages])

    def _refs(self, pages: Sequence[int]) -> list[PageRef]:
        digests = self._pool.digests(pages)
        return [PageRef(page, self._pool.epoch(page), digest) for page, digest in zip(pages, digests, strict=True)]


def _owner(ticket: KvTicket) -> str:
    return f"the lease of request {ticket.request_id}"
