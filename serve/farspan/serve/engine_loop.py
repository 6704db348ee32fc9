"""What a worker's engine thread does: requests, leases, transfers and iterations, one turn after the other.

Everything that touches pages happens in that one thread (host.py), which alone calls what is here.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass

from farspan.config.schema import TransferConfig
from farspan.engine.engine import Engine
from farspan.engine.request import FailedEvent, TokenEvent
from farspan.engine.terms import Terms
from farspan.errors import EngineError, FarspanError, TransferError
from farspan.kv.ownership import Forgotten, told
from farspan.kv.prefix import PrefixScope
from farspan.kv.puller import Arrival, Puller
from farspan.kv.ticket import KvOffer, KvTicket, LeaseTable
from farspan.kv.transports.base import Transport
from farspan.serve.load import Identity, WorkerLoad
from farspan.serve.mailbox import Inbox, Mailbox, Outbox
from farspan.serve.messages import Caller, Failed, GenerationRequest, Prefilled, Pulled, Tokens, WorkerInfo
from farspan.serve.quotas import Quota
from farspan.serve.standing import Role, load_of

logger = logging.getLogger(__name__)

# How often a thread with nothing to compute looks at running transfers, and at leases.
_TRANSFER_POLL_S = 0.0005
# While every page it needs is held elsewhere: they come back by a command or at the end of a lease.
_STALLED_POLL_S = 0.01
_IDLE_POLL_S = 0.25
# Looking over many thousand pages takes milliseconds: too much after every short request.
_CHECK_EVERY_S = 5.0
# Pages of every place that stay free for each request that is here, when a prompt is followed: they decode meanwhile.
_SPARE_PLACES = 2
# A late offer is a message on its way: it is later than few other requests.
_MOST_KNOWN = 4096


@dataclass(slots=True)
class Client:
    """Who waits for a request."""

    request: GenerationRequest
    inbox: Inbox
    started_s: float
    prefill_only: bool = False
    in_parts: bool = False
    """Pages are offered while the prompt is computed."""
    answered: tuple[int, ...] = ()
    ticket: KvTicket | None = None
    no_room_since_s: float | None = None
    """Since when there are too few free pages to fetch those of its ticket into; none: there were enough at once."""
    pull_started_s: float = 0.0


class PageWatch:
    """When the pages of an engine with nothing to do are looked over: once after something changed, and seldom."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._checked_s, self._changed = every_s, -math.inf, False

    def changed(self) -> None:
        """Pages are about to change hands, or just did."""
        self._changed = True

    def is_due(self, now_s: float) -> bool:
        """Asked while there is nothing to do; what is due is taken as done."""
        if not self._changed or now_s - self._checked_s < self._every_s:
            return False
        self._changed, self._checked_s = False, now_s
        return True


class EngineLoop:
    """The turns of one engine, and what is asked of it between them."""

    def __init__(self, role: str, engine: Engine, transport: Transport, config: TransferConfig) -> None:
        self._engine, self._outbox = engine, Outbox()
        self._role, self._transport, self._config = role, transport, config
        self._leases = LeaseTable(engine.pool, config.lease_s)
        self._offered: dict[str, str] = {}
        """The request of each open ticket."""
        self._puller = Puller(engine.pool, transport, config.deadline_s)
        self._clients: dict[str, Client] = {}
        self._wanting_pages: list[Client] = []
        self._quota, self._watch = Role(engine), PageWatch(_CHECK_EVERY_S)
        self._forgotten: list[Forgotten] = []
        """Pages that were held for nobody when they were looked over last."""
        self._known: OrderedDict[str, None] = OrderedDict()
        """Requests that were here or were forgotten, the latest last: offers for them come too late."""

    @property
    def num_leases(self) -> int:
        """Tickets and offers whose pages somebody may still fetch."""
        return self._leases.num_open

    def turn(self, commands: Mailbox) -> None:
        """What commands, leases and transfers ask for, one iteration of the engine, and everybody told.

        Raises EngineError when the engine will never compute again, or its pages are not what they should be.
        """
        if self._engine.lost:
            raise EngineError(self._engine.lost)
        for command in commands.take(self._patience()):
            command.act()
        self._expire(time.time())
        self._start_pulls()
        for arrival in self._puller.poll(time.monotonic()):
            self._after_pull(arrival)
        # An iteration takes long: nobody waits for it who need not.
        self._outbox.send()
        if self._engine.has_work:
            self._quota.keep()
            for event in self._engine.step():
                self._after_event(event)
            self._offer_parts()
            if self._engine.stalled:
                self._puller.yield_early()
        self._outbox.send()
        if self._idle and self._watch.is_due(time.monotonic()):
            self._look_over()

    @property
    def _idle(self) -> bool:
        """Whether nothing is computed, fetched or waited for; pages may still be held for others."""
        if self._engine.has_work:
            return False
        return not (self._puller.num_pulling or self._puller.num_early or self._wanting_pages)

    def check_integrity(self) -> None:
        """Raises EngineError when a page is lost or doubly owned, or held for nobody who is here."""
        if forgotten := self._find_forgotten():
            raise EngineError(told(forgotten))

    def _look_over(self) -> None:
        """Tell of pages that are held for nobody: they are room lost, and endanger nobody.

        Raises EngineError where a page is nobody's or two owners': it may be anybody's next.
        """
        found = self._find_forgotten()
        if set(found) - set(self._forgotten):
            logger.error("%s", told(found))
        self._forgotten = found

    def _find_forgotten(self) -> list[Forgotten]:
        now_s = time.time()
        self._expire(now_s)
        # Whatever is computed for others is taken and leased in the same turn.
        return self._engine.forgotten((*self._leases.owned(now_s), *self._puller.owned()), untaken=False)

    def _expire(self, unix_s: float) -> None:
        for ticket_id in self._leases.expire(unix_s):
            self._offered.pop(ticket_id, None)
            self._watch.changed()

    def fail_all(self, error: FarspanError) -> None:
        """Tell everybody who waits that there will be no more."""
        for client in list(self._clients.values()):
            self._fail(client, error)
        self._outbox.send()

    def _patience(self) -> float:
        """Seconds this turn may wait for a command."""
        if self._engine.has_work and not self._engine.stalled:
            return 0.0
        if self._puller.num_pulling or self._wanting_pages:
            return _TRANSFER_POLL_S
        return _STALLED_POLL_S if self._engine.has_work else _IDLE_POLL_S

    def admit(self, client: Client) -> None:
        """Begin to answer a request, or tell its client why not."""
        request = client.request
        if request.request_id in self._clients:
            self._outbox.put(client.inbox, Failed(EngineError(f"request {request.request_id} is already here")))
            return
        self._clients[request.request_id] = client
        self._watch.changed()
        self._know(request.request_id)
        reason = "" if client.ticket is None else self._refuse_ticket(client.ticket, client)
        if client.ticket is not None and not reason:
            self._wanting_pages.append(client)
            return
        # Its prompt may have been followed, but the right ticket never came.
        self._puller.abandon(request.request_id)
        if reason:
            self._fail(client, TransferError(request.request_id, reason))
            return
        try:
            self._engine.add(
                request.request_id,
                request.prompt,
                request.params,
                answered=client.answered,
                prefill_only=client.prefill_only,
                terms=_terms(request.caller),
            )
        except FarspanError as problem:
            self._fail(client, problem)

    def _refuse_ticket(self, ticket: KvTicket, client: Client) -> str:
        """Why the pages of a ticket are not those of the request it came with; empty when they are."""
        digest = self._adapter_digest(client.request)
        if ticket.adapter != digest:
            name = client.request.caller.adapter or "the model alone"
            return f"the ticket was not computed with what {name} is here"
        try:
            # Now: as many pages as it names, of another size perhaps, may never be free here.
            self._puller.check(ticket, time.time())
        except TransferError as problem:
            return problem.reason
        return _refuse_ticket(ticket, client)

    def _adapter_digest(self, request: GenerationRequest) -> str | None:
        """Of its adapter's matrices; empty: it has none; none: they are not here."""
        name, adapters = request.caller.adapter, self._engine.adapters
        return adapters.scope(name).adapter if name in ("", *adapters.names) else None

    def _start_pulls(self) -> None:
        for client in list(self._wanting_pages):
            ticket = client.ticket
            assert ticket is not None
            if self._is_followed(client, ticket):
                self._wanting_pages.remove(client)
                continue
            pages = self._engine.pool.alloc(len(ticket.pages), f"request {ticket.request_id}")
            waited_s = time.monotonic() - client.started_s
            if pages is None:
                client.no_room_since_s = client.no_room_since_s or time.monotonic()
                # A prompt that is complete goes before those that are not.
                self._puller.yield_early()
                if waited_s > self._config.deadline_s:
                    self._wanting_pages.remove(client)
                    self._fail(client, TransferError(ticket.request_id, f"no free pages within {waited_s:.0f} s"))
                continue
            self._wanting_pages.remove(client)
            client.pull_started_s = time.monotonic()
            try:
                self._puller.start(ticket, pages, client.pull_started_s, time.time())
            except TransferError as problem:
                self._engine.pool.free(pages)
                self._fail(client, problem)

    def _know(self, request_id: str) -> None:
        self._known[request_id] = None
        while len(self._known) > _MOST_KNOWN + len(self._clients):
            self._known.popitem(last=False)

    def _is_followed(self, client: Client, ticket: KvTicket) -> bool:
        """Whether pages of the ticket are here or under way, or it is no good: nothing is left to start."""
        client.pull_started_s = time.monotonic()
        try:
            return self._puller.complete(ticket, client.pull_started_s, time.time())
        except TransferError as problem:
            self._fail(client, problem)
            return True

    def follow(self, offer: KvOffer) -> bool:
        """Fetch pages of a prompt that is still computed elsewhere; false: they are not wanted now."""
        if offer.request_id in self._known:
            return False
        self._watch.changed()
        spare = _SPARE_PLACES * len(self._clients) * self._engine.pool.layout.num_groups
        return self._puller.follow(offer, spare, time.monotonic(), time.time())

    def _offer_parts(self) -> None:
        """Tell what is new of the prompts that are being computed."""
        for request_id, life, pages in self._engine.growing():
            client = self._clients[request_id]
            if client.in_parts and pages:
                num_tokens, source = len(client.request.prompt), self._transport.address()
                offer = self._leases.grow(request_id, life, pages, num_tokens, source, time.time())
                if offer is not None:
                    self._outbox.put(client.inbox, offer)

    def _after_pull(self, arrival: Arrival) -> None:
        client = self._clients.get(arrival.ticket.request_id)
        if arrival.pages is None or client is None:
            if arrival.pages is not None:
                self._engine.pool.free(arrival.pages)
            if client is not None and arrival.error is not None:
                self._fail(client, arrival.error)
            return
        request, ticket = client.request, arrival.ticket
        try:
            self._engine.adopt(
                request.request_id,
                request.prompt,
                request.params,
                client.answered,
                list(arrival.pages),
                terms=_terms(request.caller),
            )
        except FarspanError as problem:
            self._engine.pool.free(arrival.pages)
            self._fail(client, problem)
            return
        seconds = time.monotonic() - client.pull_started_s
        waited_from_s = client.pull_started_s if client.no_room_since_s is None else client.no_room_since_s
        self._outbox.put(
            client.inbox,
            Pulled(
                num_pages=len(ticket.pages),
                num_bytes=ticket.num_bytes,
                seconds=seconds,
                transport=self._transport.name,
                num_early=arrival.num_early,
                digest=ticket.digest,
                room_s=client.pull_started_s - waited_from_s,
            ),
        )

    def _after_event(self, event: TokenEvent | FailedEvent) -> None:
        client = self._clients[event.request_id]
        if isinstance(event, FailedEvent):
            self._fail(client, event.error)
        elif client.prefill_only:
            self._clients.pop(event.request_id)
            self._outbox.put(client.inbox, self._prefilled(client, event))
        else:
            if event.finish:
                self._clients.pop(event.request_id)
            logprobs, before = () if event.logprobs is None else (event.logprobs,), event.prompt_logprobs
            seconds = time.monotonic() - event.began_s
            self._outbox.put(
                client.inbox, Tokens((event.token,), event.finish, logprobs, before, event.num_found, seconds)
            )

    def _prefilled(self, client: Client, event: TokenEvent) -> Prefilled:
        pages, num_tokens = self._engine.take(event.request_id)
        ticket = None
        if event.finish:
            self._leases.forget(event.request_id)
            self._engine.pool.free(pages)
        else:
            adapter = self._adapter_digest(client.request)
            assert adapter is not None, "it was computed here"
            source = self._transport.address()
            ticket = self._leases.offer(event.request_id, pages, num_tokens, source, time.time(), adapter)
            self._offered[ticket.ticket_id] = event.request_id
        seconds = time.monotonic() - event.began_s
        logprobs, before = event.logprobs, event.prompt_logprobs
        return Prefilled(event.token, event.finish, ticket, seconds, logprobs, before, event.num_found)

    def _fail(self, client: Client, error: FarspanError) -> None:
        request_id = client.request.request_id
        self._clients.pop(request_id, None)
        self._leases.forget(request_id)
        self._outbox.put(client.inbox, Failed(error))

    def forget(self, request_id: str) -> None:
        """Let go of a request, whatever state it is in; unknown ones are no error."""
        self._watch.changed()
        self._know(request_id)
        client = self._clients.pop(request_id, None)
        if client in self._wanting_pages:
            self._wanting_pages.remove(client)
        self._puller.abandon(request_id)
        self._leases.forget(request_id)
        self._engine.cancel(request_id)
        # Whoever left while the ticket was on its way never saw it, and cannot give it back.
        for ticket_id in [ticket for ticket, owner in self._offered.items() if owner == request_id]:
            self.release(ticket_id)

    def release(self, ticket_id: str) -> bool:
        """Give the pages of a ticket back; false when they are no longer held for it."""
        self._offered.pop(ticket_id, None)
        self._watch.changed()
        return self._leases.release(ticket_id)

    def report(self, identity: Identity, quota: Quota | None, known_prefixes: int) -> WorkerLoad:
        """What there is to do here; with a quota, this is the role from now on."""
        if quota is not None:
            self._quota.take(quota)
        started_s = {request_id: client.started_s for request_id, client in self._clients.items()}
        return load_of(
            self._engine,
            identity,
            self._quota.given,
            started_s,
            time.monotonic(),
            self._leases.num_open,
            known_prefixes,
        )

    def describe(self) -> WorkerInfo:
        """What this worker is, and what it holds."""
        pool = self._engine.pool
        return WorkerInfo(
            role=self._role,
            pid=os.getpid(),
            layout=pool.layout.fingerprint(),
            vocab_size=self._engine.vocab_size,
            max_context_tokens=self._engine.max_context_tokens,
            kv_tokens=self._engine.room_tokens,
            num_pages=pool.num_pages,
            num_free=pool.num_free,
            num_quarantined=pool.num_quarantined,
            num_forgotten=len(self._forgotten),
            num_requests=len(self._clients),
            open_leases=self._leases.num_open,
            drafted=self._engine.drafted,
            host=self._engine.host.use if self._engine.host is not None else None,
            transport=self._transport.name,
        )


def _refuse_ticket(ticket: KvTicket, client: Client) -> str:
    """Why a ticket cannot be that of the request it came with; empty when it can."""
    request = client.request
    if ticket.num_tokens != len(request.prompt):
        return f"the ticket is for {ticket.num_tokens} tokens, the prompt has {len(request.prompt)}"
    if ticket.request_id != request.request_id:
        return "the ticket is that of another request"
    return "" if client.answered else "the first token is missing"


def _terms(caller: Caller) -> Terms:
    left_s = None if caller.deadline_at_s is None else caller.deadline_at_s - time.time()
    return Terms(
        tenant=caller.tenant,
        priority=caller.priority,
        deadline_s=None if left_s is None else time.monotonic() + left_s,
        adapter=caller.adapter,
        scope=PrefixScope(salt=caller.salt),
    )
