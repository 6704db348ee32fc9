"""What a prefill worker hands out so that another worker can fetch KV pages, and the leases behind it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

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


class LeaseTable:
    """Pages held for tickets that were handed out and not yet given back."""

    def __init__(self, pool: PagePool, lease_s: float) -> None:
        self._pool, self._lease_s = pool, lease_s
        self._open: dict[str, KvTicket] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def offer(
        self,
        request_id: str,
        pages: list[int],
        num_tokens: int,
        source: SourceAddress,
        now_s: float,
        adapter: str = "",
    ) -> KvTicket:
        """A ticket for `pages`, whose holder becomes the lease."""
        ticket = KvTicket(
            ticket_id=uuid.uuid4().hex,
            request_id=request_id,
            source=source,
            pages=tuple(PageRef(page, self._pool.epoch(page), self._pool.digest(page)) for page in pages),
            num_tokens=num_tokens,
            layout=self._pool.layout.fingerprint(),
            page_bytes=self._pool.layout.page_bytes,
            lease_until_s=now_s + self._lease_s,
            adapter=adapter,
        )
        self._open[ticket.ticket_id] = ticket
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
