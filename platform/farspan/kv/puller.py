"""Carry out transfers: one thread calls everything here, the state machine in transfer.py decides.

A transfer is read in parts, so that pages come while later ones are still computed, and digests are checked while
further bytes are under way. Every part is guarded by itself; whatever happens to one happens to the transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from farspan.errors import TransferError
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool
from farspan.kv.pull import Part, Pull, refuse_offer, refuse_ticket
from farspan.kv.ticket import KvOffer, KvTicket, PageRef
from farspan.kv.transfer import Event, State
from farspan.kv.transports.base import ReadStatus, Transport

_BROKE = "the connection to the source broke"
# Large enough for the speed of a single read, small enough that the last digests take no time.
_PART_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a pull ended: `pages` belong to the receiver, or `error` says why there are none."""

    ticket: KvTicket
    pages: list[int] | None
    error: TransferError | None
    num_early: int = 0
    """Pages that were fetched, or under way, before the ticket came."""


class Puller:
    """The transfers into one pool."""

    def __init__(self, pool: PagePool, transport: Transport, deadline_s: float, part_bytes: int = _PART_BYTES) -> None:
        """A part takes at most `deadline_s`, and has at most `part_bytes`, but a page at least."""
        self._pool, self._transport, self._deadline_s = pool, transport, deadline_s
        self._part_pages = max(1, part_bytes // max(1, pool.layout.page_bytes))
        self._pulls: list[Pull] = []
        self._quarantined: list[Part] = []

    @property
    def num_pulling(self) -> int:
        """Transfers that something is expected of at any moment."""
        return sum(pull.ticket is not None or any(part.at_work for part in pull.parts) for pull in self._pulls)

    @property
    def num_early(self) -> int:
        """Transfers whose ticket has not come yet."""
        return sum(pull.ticket is None for pull in self._pulls)

    @property
    def num_quarantined(self) -> int:
        """Parts that nobody waits for any more, and that may still write."""
        return len(self._quarantined)

    def owned(self) -> Iterator[Owned]:
        """What transfers hold, and what is quarantined for those that may still write."""
        for pull in self._pulls:
            yield Owned(_owner(pull.request_id), pull.pages)
        for part in self._quarantined:
            yield Owned("quarantine", part.pages)

    def check(self, ticket: KvTicket, unix_s: float) -> None:
        """Raises TransferError when a ticket is not acceptable, before there is a page for it."""
        refuse_ticket(ticket, self._pool.layout, self._transport.name, unix_s)

    def start(self, ticket: KvTicket, pages: list[int], now_s: float, unix_s: float) -> None:
        """Begin to fetch `ticket` into `pages` (held by the caller until this returns).

        Raises TransferError, with `pages` still the caller's, when the ticket is not acceptable.
        """
        self.check(ticket, unix_s)
        assert len(pages) == len(ticket.pages), "one local page for each page of the ticket"
        pull = Pull(ticket.request_id, ticket.ticket_id, ticket.source, ticket.num_tokens, pages, now_s, ticket)
        self._begin(pull, ticket.pages, now_s)
        if not pull.parts:
            raise TransferError(ticket.request_id, pull.problem)
        self._pool.hand(pages, _owner(ticket.request_id))
        self._pulls.append(pull)

    def follow(self, offer: KvOffer, spare_pages: int, now_s: float, unix_s: float) -> bool:
        """Fetch pages of a prompt that is still computed elsewhere; false: not wanted, and nothing is held for it.

        Its first offer takes pages for the whole prompt, if `spare_pages` stay free. Only with the ticket
        (`complete`) do they arrive anywhere; what fails before is forgotten: the ticket brings it again.
        """
        pull = self._of(offer.request_id)
        if pull is not None and pull.ticket is not None:
            return False
        try:
            refuse_offer(offer, self._pool.layout, self._transport.name, unix_s)
        except TransferError as problem:
            self._drop(pull, problem.reason)
            return False
        news = None if pull is None else pull.news(offer)
        if news is None:
            self._drop(pull, "other pages were offered in their place")
            # A prompt whose pages were lost is offered anew, from the beginning.
            pull, news = None if offer.first else self._open(offer, spare_pages), offer.pages
        if pull is None:
            return False
        pull.until_s = now_s + offer.lease_until_s - unix_s
        self._begin(pull, news, now_s)
        if pull.problem:
            self._drop(pull, pull.problem)
        return not pull.problem

    def complete(self, ticket: KvTicket, now_s: float, unix_s: float) -> bool:
        """The ticket of a prompt that was followed: what is missing is fetched; false: there is nothing to go on with.

        Raises TransferError when the ticket is not acceptable. Either way nothing is held for it.
        """
        pull = self._of(ticket.request_id)
        if pull is None or pull.ticket is not None:
            return False
        try:
            self.check(ticket, unix_s)
        except TransferError as problem:
            self._drop(pull, problem.reason)
            raise
        if not pull.is_begun_by(ticket):
            self._drop(pull, "the ticket names other pages than were offered")
            return False
        pull.ticket, pull.num_early = ticket, len(pull.refs)
        self._begin(pull, ticket.pages[len(pull.refs) :], now_s)
        return True

    def abandon(self, request_id: str) -> None:
        """Nobody waits for this request's pages any more."""
        self._drop(self._of(request_id), "the request was cancelled")

    def yield_early(self) -> bool:
        """Give up the newest transfer without a ticket, because its pages are needed now; false: there is none."""
        pull = next((pull for pull in reversed(self._pulls) if pull.ticket is None), None)
        if pull is not None:
            self._drop(pull, "its pages were needed")
        return pull is not None

    def poll(self, now_s: float) -> list[Arrival]:
        """Look at every transfer once, without waiting; the ones with a ticket that ended since the last look."""
        self._reap()
        arrivals: list[Arrival] = []
        for pull in list(self._pulls):
            for part in pull.parts:
                self._advance(pull, part, now_s)
            if reason := pull.reason:
                self._drop(pull, reason)
                if pull.ticket is not None:
                    arrivals.append(Arrival(pull.ticket, None, TransferError(pull.request_id, reason)))
            elif pull.ticket is None:
                if now_s >= pull.until_s:
                    self._drop(pull, "its ticket never came")
            elif pull.has_landed:
                self._pulls.remove(pull)
                for part in pull.parts:
                    part.transfer = part.transfer.after(Event.ADOPTED)
                arrivals.append(Arrival(pull.ticket, pull.pages, None, pull.num_early))
        return arrivals

    def _open(self, offer: KvOffer, spare_pages: int) -> Pull | None:
        count = self._pool.layout.num_travelling(offer.num_tokens)
        owner = _owner(offer.request_id)
        pages = self._pool.alloc(count, owner) if count + spare_pages <= self._pool.num_free else None
        if pages is None:
            return None
        pull = Pull(offer.request_id, offer.ticket_id, offer.source, offer.num_tokens, pages, 0.0)
        self._pulls.append(pull)
        return pull

    def _begin(self, pull: Pull, refs: Sequence[PageRef], now_s: float) -> None:
        """Post the reads of the next pages; `pull.problem` says why some could not be."""
        for at in range(0, len(refs), self._part_pages):
            wanted = tuple(refs[at : at + self._part_pages])
            pages = pull.pages[len(pull.refs) :][: len(wanted)]
            try:
                data = self._transport.read_pages(pull.source, [ref.page for ref in wanted], pages)
            except TransferError as problem:
                pull.problem = problem.reason
                return
            pull.parts.append(Part(wanted, pages, now_s + self._deadline_s, data))
            pull.refs += wanted

    def _of(self, request_id: str) -> Pull | None:
        return next((pull for pull in self._pulls if pull.request_id == request_id), None)

    def _advance(self, pull: Pull, part: Part, now_s: float) -> None:
        if part.transfer.state is State.PULLING:
            self._advance_data(pull, part)
        if part.transfer.state is State.LANDED:
            self._advance_epochs(part)
        if part.at_work and now_s >= part.deadline_s:
            part.transfer = part.transfer.after(Event.LATE, f"no answer within {self._deadline_s:g} s")

    def _advance_data(self, pull: Pull, part: Part) -> None:
        assert part.data is not None
        status = part.data.status()
        if status is ReadStatus.FAILED:
            part.transfer = part.transfer.after(Event.BROKEN, _BROKE)
        elif status is ReadStatus.DONE:
            part.transfer = part.transfer.after(Event.LANDED)
            # Only now: the epochs must be read after the last byte of the data.
            try:
                part.epochs = self._transport.read_epochs(pull.source, [ref.page for ref in part.refs])
            except TransferError as problem:
                part.transfer = part.transfer.after(Event.BROKEN, problem.reason)

    def _advance_epochs(self, part: Part) -> None:
        assert part.epochs is not None
        status = part.epochs.status()
        if status is ReadStatus.FAILED:
            part.transfer = part.transfer.after(Event.BROKEN, _BROKE)
        elif status is ReadStatus.DONE:
            foreign = self._find_foreign(part)
            part.transfer = part.transfer.after(Event.FOREIGN if foreign else Event.VERIFIED, foreign)
            part.close()

    def _find_foreign(self, part: Part) -> str:
        assert part.epochs is not None
        for ref, epoch in zip(part.refs, part.epochs.epochs(), strict=True):
            if epoch != ref.epoch:
                return f"page {ref.page} of the source was re-used (epoch {epoch}, offered {ref.epoch})"
        for ref, digest in zip(part.refs, self._pool.digests(part.pages), strict=True):
            if digest != ref.digest:
                return f"page {ref.page} of the source arrived with other bytes than were offered"
        return ""

    def _drop(self, pull: Pull | None, reason: str) -> None:
        """Forget a transfer: its pages are free, those of parts that may still write are quarantined."""
        if pull is None:
            return
        self._pulls.remove(pull)
        waiting: set[int] = set()
        for part in pull.parts:
            part.abandon(reason)
            if part.transfer.state is State.QUARANTINED:
                waiting.update(part.pages)
                self._pool.quarantine(part.pages)
                self._quarantined.append(part)
            else:
                part.close()
        self._pool.free([page for page in pull.pages if page not in waiting])

    def _reap(self) -> None:
        for part in [part for part in self._quarantined if part.is_over]:
            part.transfer = part.transfer.after(Event.OVER)
            self._quarantined.remove(part)
            part.close()
            self._pool.release_quarantine(part.pages)


def _owner(request_id: str) -> str:
    return f"the transfer of request {request_id}"
