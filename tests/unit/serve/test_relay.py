"""Offers go to the decode worker that will answer, in order, and an answer never depends on them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from ray.serve.exceptions import ReplicaUnavailableError

from farspan.engine.request import SamplingParams
from farspan.kv.ticket import KvOffer, KvTicket, SourceAddress
from farspan.serve.messages import GenerationRequest, Prefilled, Tokens
from farspan.serve.router import Router

SOURCE = SourceAddress("memory", "i", b"", 0, 0, 4)
REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=2))
TICKET = KvTicket("t", "r", SOURCE, (), 3, "layout", 64, 1e12)
OFFERS = [KvOffer("t", "r", SOURCE, first, (), 3, "layout", 64, 1e12) for first in range(3)]
LAST = Tokens((8,), "length")


class Stream:
    """What one worker says; an exception is raised."""

    def __init__(self, items) -> None:
        self._items, self.cancelled = list(items), False

    async def __aiter__(self):
        for item in self._items:
            # The other side has its turns too.
            for _ in range(5):
                await asyncio.sleep(0)
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment of one replica."""

    def __init__(self, said=(), wants: int = 100) -> None:
        self.said, self.wants = said, wants
        self.named: str | None = None
        self.told: list[tuple] = []
        self.places = 0
        self.calls: list[str] = []

    def options(self, session_id=None, **_):
        self.named = session_id or self.named
        return self

    @property
    def follow(self):
        async def told(replica_id, offer):
            assert replica_id == self.named == "replica"
            self.told.append(offer)
            return len(self.told) <= self.wants

        return SimpleNamespace(remote=told)

    @property
    def resume(self):
        return SimpleNamespace(choose_replica=self.choose_replica, remote=self.remote)

    prefill_in_parts = resume

    @asynccontextmanager
    async def choose_replica(self, request):
        self.places += 1
        try:
            yield SimpleNamespace(replica_id="replica")
        finally:
            self.places -= 1

    def dispatch(self, chosen, *arguments):
        assert chosen.replica_id == "replica"
        self.calls.append("dispatch")
        return Stream(self.said)

    def remote(self, *arguments):
        assert self.places == 0, "a place is kept that nobody gives back when the ingress dies"
        self.calls.append(f"remote {self.named}")
        return Stream(self.said)

    @property
    def carry(self):
        return SimpleNamespace(remote=lambda *_: Stream([]))

    def broadcast(self, verb, *arguments):
        self.calls.append(verb)

        async def results(**_):
            return [True]

        return SimpleNamespace(results_async=results)


async def asked(router: Router) -> tuple:
    prefilled = await router.prefill(REQUEST)
    items = [item async for item in router.resume(REQUEST, (7,), TICKET)]
    await settled()
    return prefilled, items


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def prefilled(ticket=TICKET) -> Prefilled:
    return Prefilled(7, None if ticket else "stop", ticket, 0.1)


def test_offers_are_told_in_order_to_the_worker_that_answers_and_no_place_is_kept_there():
    decode = Handle([LAST])
    router = Router(Handle([*OFFERS, prefilled()]), decode)
    assert asyncio.run(asked(router)) == (prefilled(), [LAST])
    assert decode.told == OFFERS
    assert decode.calls == ["remote replica"]
    assert (decode.places, router._relays) == (0, {})


def test_without_an_offer_any_worker_answers():
    decode = Handle([LAST])
    router = Router(Handle([prefilled()]), decode)
    assert asyncio.run(asked(router)) == (prefilled(), [LAST])
    assert (decode.told, decode.calls, router._relays) == ([], ["remote None"], {})


def test_a_worker_that_does_not_want_an_offer_is_told_of_no_other():
    decode = Handle([LAST], wants=1)
    assert asyncio.run(asked(Router(Handle([*OFFERS, prefilled()]), decode)))[1] == [LAST]
    assert decode.told == OFFERS[:2]


def test_a_worker_that_is_lost_after_it_said_something_is_not_asked_again_from_the_beginning():
    first = Tokens((7,), None)
    decode = Handle([first, ReplicaUnavailableError("replica")])
    items = asyncio.run(asked(Router(Handle([*OFFERS, prefilled()]), decode)))[1]
    assert items[0] == first
    assert "decode worker was lost" in str(items[1].error)
    assert decode.calls == ["remote replica"]


@pytest.mark.parametrize("how", ["over with its first token", "cancelled"])
def test_pages_nobody_will_ask_for_are_given_up(how):
    decode = Handle([LAST])
    over = how != "cancelled"

    async def run() -> None:
        router = Router(Handle([*OFFERS, prefilled(None if over else TICKET)]), decode)
        await router.prefill(REQUEST)
        if not over:
            router.cancel(REQUEST.request_id)
        await settled()
        assert (decode.calls, decode.places, router._relays) == (["cancel"], 0, {})

    asyncio.run(run())
