"""One transfer as its receiver keeps it: where its pages go, what was offered of it, and the parts that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from farspan.errors import TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.ticket import KvOffer, KvTicket, PageRef, SourceAddress
from farspan.kv.transfer import Event, State, Transfer
from farspan.kv.transports.base import EpochRead, Read, ReadStatus

_AT_WORK = (State.PULLING, State.LANDED)


@dataclass(slots=True)
class Part:
    """Pages that are read, verified and, where need be, quarantined together."""

    refs: tuple[PageRef, ...]
    pages: list[int]
    """Where they go, one local page for each."""
    deadline_s: float
    data: Read | None
    epochs: EpochRead | None = None
    transfer: Transfer = field(default_factory=lambda: Transfer().after(Event.STARTED))

    @property
    def at_work(self) -> bool:
        """Whether the transport still has something to do for it."""
        return self.transfer.state in _AT_WORK

    @property
    def is_over(self) -> bool:
        """Whether nothing that was posted for it can write any more."""
        return all(read is None or read.status() is not ReadStatus.PENDING for read in (self.data, self.epochs))

    def abandon(self, reason: str) -> None:
        """Nobody wants it any more, whatever state it is in."""
        if self.transfer.state is State.CHECKED or self.at_work:
            self.transfer = self.transfer.after(Event.ABANDONED, reason)

    def close(self) -> None:
        """Give its reads back, which have ended."""
        for read in (self.data, self.epochs):
            if read is not None:
                read.close()
        self.data = self.epochs = None


@dataclass(eq=False, slots=True)
class Pull:
    """One transfer and what it holds: a page for everything that its ticket names, or will name."""

    request_id: str
    ticket_id: str
    source: SourceAddress
    num_tokens: int
    pages: list[int]
    until_s: float
    """While there is no ticket: how long one is waited for."""
    ticket: KvTicket | None = None
    refs: list[PageRef] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    num_early: int = 0
    """Pages that were offered before the ticket came."""
    problem: str = ""
    """Why a part could not even start."""

    @property
    def has_landed(self) -> bool:
        """Whether everything the ticket names is here and verified."""
        return self.ticket is not None and all(part.transfer.state is State.CHECKED for part in self.parts)

    @property
    def reason(self) -> str:
        """Why it failed, if it did."""
        return next((part.transfer.reason for part in self.parts if part.transfer.reason), self.problem)

    def news(self, offer: KvOffer) -> tuple[PageRef, ...] | None:
        """What an offer adds; None when it is not of this transfer, leaves a gap, or takes back what was offered."""
        known = len(self.refs) - offer.first
        same = (offer.ticket_id, offer.source, offer.num_tokens) == (self.ticket_id, self.source, self.num_tokens)
        if not same or known < 0 or self.refs[offer.first :][: len(offer.pages)] != list(offer.pages[:known]):
            return None
        return offer.pages[known:]

    def is_begun_by(self, ticket: KvTicket) -> bool:
        """Whether everything that was offered is what the ticket names first."""
        same = (ticket.ticket_id, ticket.source, ticket.num_tokens) == (self.ticket_id, self.source, self.num_tokens)
        return same and list(ticket.pages[: len(self.refs)]) == self.refs


def refuse_ticket(ticket: KvTicket, layout: KvLayout, transport: str, unix_s: float) -> None:
    """Raises TransferError when a ticket cannot be honoured, before a byte moves."""
    if not ticket.pages:
        raise TransferError(ticket.request_id, "the ticket names no page")
    _refuse(ticket, layout, transport, unix_s)
    if len(ticket.pages) != layout.num_travelling(ticket.num_tokens):
        reason = f"the ticket names {len(ticket.pages)} pages for {ticket.num_tokens} tokens"
        raise TransferError(ticket.request_id, reason)


def refuse_offer(offer: KvOffer, layout: KvLayout, transport: str, unix_s: float) -> None:
    """Raises TransferError when what is offered cannot be the beginning of a ticket that can be honoured."""
    _refuse(offer, layout, transport, unix_s)
    most = layout.num_travelling(max(0, offer.num_tokens))
    if offer.first < 0 or offer.first + len(offer.pages) > most:
        last = offer.first + len(offer.pages)
        raise TransferError(offer.request_id, f"pages {offer.first}..{last} of {most} are offered")


def _refuse(offered: KvTicket | KvOffer, layout: KvLayout, transport: str, unix_s: float) -> None:
    def refuse(reason: str) -> None:
        raise TransferError(offered.request_id, reason)

    if offered.layout != layout.fingerprint():
        refuse("the source has another model or KV layout, or another number of ranks")
    if len(offered.source.ranks) + 1 != layout.num_ranks:
        refuse(f"the source names {len(offered.source.ranks) + 1} ranks, its layout {layout.num_ranks}")
    if offered.source.transport != transport:
        refuse(f"the source speaks {offered.source.transport}, not {transport}; set transfer.transport")
    if offered.lease_until_s <= unix_s:
        refuse("the lease has expired")
    if unknown := _unknown(offered.pages, offered.source.num_pages):
        refuse(f"the source has no page {unknown[0]}, only 0..{offered.source.num_pages - 1}")


def _unknown(refs: Sequence[PageRef], num_pages: int) -> list[int]:
    return [ref.page for ref in refs if not 0 <= ref.page < num_pages]
