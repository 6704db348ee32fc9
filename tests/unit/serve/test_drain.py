"""A worker that is told to go stays until nobody fetches pages from it, and not longer than it may."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.unit.engine.tiny import prompts, reference, tiny_model
from tests.unit.serve.test_host import Hosts, collect, idle, request

MAX_TOKENS = 20


@pytest.fixture
def hosts():
    made = Hosts()
    yield made
    made.stop()


def test_twenty_open_leases_are_all_fetched_from_a_worker_that_is_told_to_go(hosts):
    asked = prompts(*range(20, 40))

    async def run() -> None:
        prefilled = await asyncio.gather(
            *(hosts.prefill.prefill(request(f"r{n}", prompt, MAX_TOKENS)) for n, prompt in enumerate(asked))
        )
        assert (await hosts.prefill.info()).open_leases == 20
        going = asyncio.ensure_future(hosts.prefill.drain(60.0))

        async def fetch(number: int) -> list[int]:
            ticket, first = prefilled[number].ticket, prefilled[number].token
            tokens, _ = await collect(
                hosts.decode.stream(request(f"r{number}", asked[number], MAX_TOKENS), (first,), ticket)
            )
            assert not going.done()
            await hosts.prefill.release(ticket.ticket_id)
            return [first, *tokens]

        answers = await asyncio.gather(*(fetch(number) for number in range(20)))
        model = tiny_model()
        assert answers == [reference(model, prompt, MAX_TOKENS) for prompt in asked]
        await asyncio.wait_for(going, 30)
        await hosts.settled(idle)

    asyncio.run(run())


def test_leases_that_nobody_fetches_do_not_keep_it_for_ever(hosts):
    (prompt,) = prompts(20)

    async def run() -> None:
        await hosts.prefill.prefill(request("forgotten", prompt))
        started_s = time.monotonic()
        await hosts.prefill.drain(0.3)
        assert time.monotonic() - started_s >= 0.3
        assert (await hosts.prefill.info()).open_leases == 1
        await hosts.decode.drain(60.0)

    asyncio.run(run())


def test_a_worker_whose_engine_has_ended_goes_at_once(hosts):
    async def run() -> None:
        hosts.prefill.stop()
        await asyncio.wait_for(hosts.prefill.drain(60.0), 30)

    asyncio.run(run())
