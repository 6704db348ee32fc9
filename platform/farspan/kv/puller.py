"""Carry out transfers: one thread calls `start` and `poll`, the state machine in transfer.py decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from farspan.errors import TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.ticket import KvTicket
from farspan.kv.transfer import Event, State, Transfer
from farspan.kv.transports.base import EpochRead, Read, ReadStatus, Transport


@dataclass(slots=True)
class Pull:
    """One transfer and what it holds."""

    ticket: KvTicket
    deadline_s: float
    pages: list[int]
    transfer: Transfer = field(default_factory=Transfer)
    data: Read | None = None
    epochs: EpochRead | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a pull ended: `pages` belong to the receiver, or `error` says why there are none."""

    ticket: KvTicket
    pages: list[int] | None
    error: TransferError | None


class Puller:
    """The transfers into one pool."""

    def __init__(self, pool: PagePool, transport: Transport, deadline_s: float) -> None:
        self._pool, self._transport, self._deadline_s = pool, transport, deadline_s
        self._pulling: list[Pull] = []
        self._quarantined: list[Pull] = []

    @property
    def num_pulling(self) -> int:
        return len(self._pulling)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def start(self, ticket: KvTicket, pages: list[int], now_s: float, unix_s: float) -> None:
        """Begin to fetch `ticket` into `pages` (held by the caller until this returns).

        Raises TransferError, with `pages` still the caller's, when the ticket is not acceptable.
        """
        refuse_ticket(ticket, self._pool.layout, self._transport.name, unix_s)
        assert len(pages) == len(ticket.pages), "one local page for each page of the ticket"
        pull = Pull(ticket, now_s + self._deadline_s, pages)
        pull.data = self._transport.read_pages(ticket.source, [ref.page for ref in ticket.pages], pages)
        pull.transfer = pull.transfer.after(Event.STARTED)
        self._pulling.append(pull)

    def abandon(self, request_id: str) -> None:
        """Nobody waits for this request's pages any more."""
        for pull in [p for p in self._pulling if p.ticket.request_id == request_id]:
            self._pulling.remove(pull)
            self._fail(pull, Event.ABANDONED, "the request was cancelled")

    def poll(self, now_s: float) -> list[Arrival]:
        """Look at every transfer once, without waiting; the ones that ended since the last look."""
        self._reap()
        arrivals: list[Arrival] = []
        for pull in list(self._pulling):
            self._advance(pull, now_s)
            if pull.transfer.state in (State.PULLING, State.LANDED):
                continue
            self._pulling.remove(pull)
            if pull.transfer.state is State.COMMITTED:
                arrivals.append(Arrival(pull.ticket, pull.pages, None))
            else:
                error = TransferError(pull.ticket.request_id, pull.transfer.reason)
                arrivals.append(Arrival(pull.ticket, None, error))
        return arrivals

    def _advance(self, pull: Pull, now_s: float) -> None:
        if pull.transfer.state is State.PULLING:
            self._advance_data(pull)
        if pull.transfer.state is State.LANDED:
            self._advance_epochs(pull)
        if pull.transfer.state in (State.PULLING, State.LANDED) and now_s >= pull.deadline_s:
            self._fail(pull, Event.LATE, f"no answer within {self._deadline_s:g} s")

    def _advance_data(self, pull: Pull) -> None:
        assert pull.data is not None
        status = pull.data.status()
        if status is ReadStatus.FAILED:
            self._fail(pull, Event.BROKEN, "the connection to the source broke")
        elif status is ReadStatus.DONE:
            pull.transfer = pull.transfer.after(Event.LANDED)
            # Only now: the epochs must be read after the last byte of the data.
            try:
                pull.epochs = self._transport.read_epochs(pull.ticket.source, [r.page for r in pull.ticket.pages])
            except TransferError as problem:
                self._fail(pull, Event.BROKEN, problem.reason)

    def _advance_epochs(self, pull: Pull) -> None:
        assert pull.epochs is not None
        status = pull.epochs.status()
        if status is ReadStatus.FAILED:
            self._fail(pull, Event.BROKEN, "the connection to the source broke")
        elif status is ReadStatus.DONE:
            foreign = self._find_foreign(pull)
            if foreign:
                self._fail(pull, Event.FOREIGN, foreign)
                return
            self._close(pull)
            pull.transfer = pull.transfer.after(Event.VERIFIED).after(Event.ADOPTED)

    def _find_foreign(self, pull: Pull) -> str:
        assert pull.epochs is not None
        for ref, local, epoch in zip(pull.ticket.pages, pull.pages, pull.epochs.epochs(), strict=True):
            if epoch != ref.epoch:
                return f"page {ref.page} of the source was re-used (epoch {epoch}, offered {ref.epoch})"
            if self._pool.digest(local) != ref.digest:
                return f"page {ref.page} of the source arrived with other bytes than were offered"
        return ""

    def _fail(self, pull: Pull, event: Event, reason: str) -> None:
        pull.transfer = pull.transfer.after(event, reason)
        if pull.transfer.state is State.QUARANTINED:
            self._pool.quarantine(pull.pages)
            self._quarantined.append(pull)
            return
        self._close(pull)
        self._pool.free(pull.pages)

    def _reap(self) -> None:
        for pull in list(self._quarantined):
            if all(read is None or read.status() is not ReadStatus.PENDING for read in (pull.data, pull.epochs)):
                pull.transfer = pull.transfer.after(Event.OVER)
                self._quarantined.remove(pull)
                self._close(pull)
                self._pool.release_quarantine(pull.pages)

    def _close(self, pull: Pull) -> None:
        for read in (pull.data, pull.epochs):
            if read is not None:
                read.close()


def refuse_ticket(ticket: KvTicket, layout: KvLayout, transport: str, unix_s: float) -> None:
    """Raises TransferError when a ticket cannot be honoured, before a byte moves."""

    def refuse(reason: str) -> None:
        raise TransferError(ticket.request_id, reason)

    if ticket.layout != layout.fingerprint():
        refuse("the source has another model or KV layout")
    if ticket.source.transport != transport:
        refuse(f"the source speaks {ticket.source.transport}, not {transport}")
    if ticket.lease_until_s <= unix_s:
        refuse("the lease has expired")
    if not ticket.pages:
        refuse("the ticket names no page")
    if len(ticket.pages) != layout.num_travelling(ticket.num_tokens):
        refuse(f"the ticket names {len(ticket.pages)} pages for {ticket.num_tokens} tokens")
    if unknown := [ref.page for ref in ticket.pages if not 0 <= ref.page < ticket.source.num_pages]:
        refuse(f"the source has no page {unknown[0]}, only 0..{ticket.source.num_pages - 1}")
