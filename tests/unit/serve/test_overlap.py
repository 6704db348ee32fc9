"""A decode worker fetches pages while their prompt is computed; whoever leaves or dies then, nothing is held."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model
from tests.unit.serve.test_host import collect, idle, request

from farspan.config.schema import TransferConfig
from farspan.engine.engine import Engine
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.kv.transports.base import ReadStatus
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve.host import EngineHost
from farspan.serve.messages import Failed, Prefilled, Pulled

MAX_TOKENS = 20


class Hosts:
    """A prefill host that computes 16 tokens at a time, a step whenever it is let, and a decode host."""

    def __init__(self, lease_s: float = 60.0, **decode: int) -> None:
        network, config = MemoryNetwork(), TransferConfig(deadline_s=30.0, lease_s=lease_s)
        self.engines = [
            Engine(tiny_model(), engine_config(max_batch_tokens=16)),
            Engine(tiny_model(), engine_config(**decode)),
        ]
        self.transports = [MemoryTransport(engine.pool, network) for engine in self.engines]
        self.prefill, self.decode = (
            EngineHost(role, engine, transport, config)
            for role, engine, transport in zip(("prefill", "decode"), self.engines, self.transports, strict=True)
        )
        self._turns = threading.Semaphore(0)
        self._free = False
        step = self.engines[0].step

        def in_turn() -> list:
            if not self._free:
                assert self._turns.acquire(timeout=30), "nobody let the prompt go on"
            return step()

        self.engines[0].step = in_turn
        for host in (self.prefill, self.decode):
            host.start()

    def go_on(self, steps: int = 1) -> None:
        """Let the prefill worker compute the next parts."""
        for _ in range(steps):
            self._turns.release()

    def go_free(self) -> None:
        """Nothing waits any more."""
        self._free = True
        self.go_on()

    async def settled(self) -> None:
        deadline = time.monotonic() + 30
        while not all([idle(await host.info()) for host in (self.prefill, self.decode)]):
            assert time.monotonic() < deadline, "it never settled"
            await asyncio.sleep(0.01)
        for host in (self.prefill, self.decode):
            await host.check_integrity()

    def stop(self) -> None:
        self.go_free()
        for host in (self.prefill, self.decode):
            host.stop()


@pytest.fixture
def hosts():
    made = Hosts()
    yield made
    made.stop()


async def follow_all(hosts: Hosts, items, most: int | None = None) -> tuple[list[KvOffer], Prefilled | Failed | None]:
    """Tell the decode host of every offer, at most so many; (offers, how it ended)."""
    offers: list[KvOffer] = []
    hosts.go_on()
    async for item in items:
        if not isinstance(item, KvOffer):
            return offers, item
        offers.append(item)
        assert await hosts.decode.follow(item)
        if len(offers) == most:
            break
        hosts.go_on()
    return offers, None


def test_pages_are_there_before_the_prompt_is_computed_and_the_answer_is_the_models(hosts):
    asked = prompts(60, 33, 16)
    expected = [reference(tiny_model(), prompt, MAX_TOKENS) for prompt in asked]

    async def run() -> None:
        for number, prompt in enumerate(asked):
            one = request(f"r{number}", prompt)
            offers, prefilled = await follow_all(hosts, hosts.prefill.prefill_in_parts(one))
            assert isinstance(prefilled, Prefilled)
            assert [offer.first for offer in offers] == [0, 4, 8][: len(offers)]
            assert len(offers) == -(-len(prompt) // 16) - 1
            # They are here by now: whatever happens to the source's copies does not matter.
            for offer in offers:
                for ref in offer.pages:
                    hosts.engines[0].pool.storage_PB[ref.page] = 9
            tokens, items = await collect(hosts.decode.stream(one, (prefilled.token,), prefilled.ticket))
            assert isinstance(items[0], Pulled)
            assert items[0].num_early == sum(len(offer.pages) for offer in offers)
            assert [prefilled.token, *tokens] == expected[number]
            assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled()

    asyncio.run(run())


@pytest.mark.parametrize("num_offers", [1, 2, 3])
@pytest.mark.parametrize("who", ["client", "source"])
def test_whoever_leaves_while_a_prompt_is_followed_frees_everything_on_both_sides(hosts, num_offers, who):
    (prompt,) = prompts(60)
    one = request("gone", prompt)

    async def run() -> None:
        items = hosts.prefill.prefill_in_parts(one)
        await follow_all(hosts, items, num_offers)
        assert (await hosts.decode.info()).num_free < hosts.engines[1].pool.num_pages
        if who == "source":
            hosts.transports[0].close()
        hosts.go_free()
        await items.aclose()
        await hosts.prefill.cancel("gone")
        await hosts.decode.cancel("gone")
        await hosts.settled()

    asyncio.run(run())


def test_an_offer_that_comes_after_its_request_was_forgotten_or_answered_holds_nothing(hosts):
    (prompt,) = prompts(60)
    one = request("late", prompt)

    async def run() -> None:
        offers, prefilled = await follow_all(hosts, hosts.prefill.prefill_in_parts(one))
        await collect(hosts.decode.stream(one, (prefilled.token,), prefilled.ticket))
        assert not await hosts.decode.follow(offers[0])
        await hosts.decode.cancel("never seen")
        assert not await hosts.decode.follow(replace(offers[0], request_id="never seen"))
        await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled()

    asyncio.run(run())


def test_a_prompt_whose_prefill_worker_died_is_computed_where_it_was_followed(hosts):
    (prompt,) = prompts(60)
    one = request("r", prompt)
    expected = reference(tiny_model(), prompt, MAX_TOKENS)

    async def run() -> None:
        items = hosts.prefill.prefill_in_parts(one)
        await follow_all(hosts, items, 2)
        hosts.transports[0].close()
        tokens, _ = await collect(hosts.decode.stream(one, (), None))
        assert tokens == expected
        hosts.go_free()
        await items.aclose()
        await hosts.settled()

    asyncio.run(run())


@pytest.mark.parametrize("wrong", ["gap", "forged digest", "other layout", "expired", "unknown page", "too many"])
def test_a_wrong_offer_costs_nothing_but_time(hosts, wrong):
    (prompt,) = prompts(60)
    one = request("r", prompt)
    expected = reference(tiny_model(), prompt, MAX_TOKENS)

    def changed(offer: KvOffer) -> KvOffer:
        first = offer.pages[0]
        return {
            "gap": replace(offer, first=offer.first + 1),
            "forged digest": replace(offer, pages=(replace(first, digest=first.digest ^ 1), *offer.pages[1:])),
            "other layout": replace(offer, layout="another model"),
            "expired": replace(offer, lease_until_s=time.time() - 1),
            "unknown page": replace(offer, pages=(replace(first, page=10**6), *offer.pages[1:])),
            "too many": replace(offer, num_tokens=3),
        }[wrong]

    async def run() -> None:
        hosts.go_free()
        followed: list[bool] = []
        async for item in hosts.prefill.prefill_in_parts(one):
            if isinstance(item, KvOffer):
                followed.append(await hosts.decode.follow(changed(item)))
            else:
                prefilled = item
        if wrong != "forged digest":
            assert not any(followed)
            assert (await hosts.decode.info()).num_free == hosts.engines[1].pool.num_pages
        tokens, items = await collect(hosts.decode.stream(one, (prefilled.token,), prefilled.ticket))
        assert [prefilled.token, *tokens] == expected
        assert items[0].num_early == 0
        await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled()

    asyncio.run(run())


def test_a_ticket_of_another_request_is_refused_though_it_fits(hosts):
    prompt, other = prompts(40, 40)

    async def run() -> None:
        hosts.go_free()
        theirs = await hosts.prefill.prefill(request("theirs", other))
        items = (await collect(hosts.decode.stream(request("mine", prompt), (theirs.token,), theirs.ticket)))[1]
        assert "that of another request" in str(items[0].error)
        assert len(items) == 1
        await hosts.prefill.release(theirs.ticket.ticket_id)
        await hosts.settled()

    asyncio.run(run())


def test_a_prompt_that_is_followed_gives_its_pages_to_one_that_is_complete():
    prompt, other = prompts(60, 61)
    layout_bytes = Engine(tiny_model(), engine_config()).pool.layout.page_bytes
    # Room for one prompt and a little of its answer.
    hosts = Hosts(kv_bytes=22 * layout_bytes)
    expected = [reference(tiny_model(), one, MAX_TOKENS) for one in (prompt, other)]

    async def run() -> None:
        items = hosts.prefill.prefill_in_parts(request("early", prompt))
        await follow_all(hosts, items, 1)
        assert (await hosts.decode.info()).num_free < 8
        # Computed where it is decoded: there is no room beside the pages that are only expected.
        tokens, _ = await collect(hosts.decode.stream(request("now", other), (), None))
        assert tokens == expected[1]
        hosts.go_free()
        async for item in items:
            if isinstance(item, KvOffer):
                assert not await hosts.decode.follow(item)
            else:
                prefilled = item
        tokens, found = await collect(
            hosts.decode.stream(request("early", prompt), (prefilled.token,), prefilled.ticket)
        )
        assert [prefilled.token, *tokens] == expected[0]
        assert found[0].num_early == 0
        await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled()

    try:
        asyncio.run(run())
    finally:
        hosts.stop()


def test_a_prompt_whose_ticket_never_comes_is_given_up_when_its_lease_ends():
    hosts = Hosts(lease_s=0.3)
    (prompt,) = prompts(60)

    async def run() -> None:
        items = hosts.prefill.prefill_in_parts(request("r", prompt))
        await follow_all(hosts, items, 2)
        deadline = time.monotonic() + 30
        while (await hosts.decode.info()).num_free < hosts.engines[1].pool.num_pages:
            assert time.monotonic() < deadline, "it waits for ever"
            await asyncio.sleep(0.02)
        hosts.go_free()
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Prefilled):
                    ticket: KvTicket = item.ticket
        await hosts.prefill.release(ticket.ticket_id)
        await hosts.settled()

    try:
        asyncio.run(run())
    finally:
        hosts.stop()


def test_a_part_that_hangs_is_quarantined_when_its_request_goes_and_everything_else_is_free(hosts):
    (prompt,) = prompts(60)
    one = request("r", prompt)

    class Hanging:
        now = ReadStatus.PENDING

        def status(self):
            return self.now

        def close(self):
            assert self.now is not ReadStatus.PENDING

    async def run() -> None:
        stuck, read = Hanging(), hosts.transports[1].read_pages
        items = hosts.prefill.prefill_in_parts(one)
        await follow_all(hosts, items, 1)
        hosts.transports[1].read_pages = lambda *_: stuck
        hosts.go_on()
        await hosts.decode.follow(await anext(items))
        hosts.transports[1].read_pages = read
        await hosts.decode.cancel("r")
        info = await hosts.decode.info()
        assert (info.num_quarantined, info.num_free) == (4, info.num_pages - 4)
        stuck.now = ReadStatus.DONE
        hosts.go_free()
        await items.aclose()
        await hosts.settled()

    asyncio.run(run())
