"""An engine behind asyncio: answers are the engine's own, and nothing is held for those who left."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import pytest
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model

from farspan.config.schema import TransferConfig
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.errors import EngineError, RequestError, TransferError
from farspan.kv.ticket import LeaseTable
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve.engine_loop import PageWatch
from farspan.serve.host import EngineHost
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, Tokens

MAX_TOKENS = 20


def request(name: str, prompt: list[int], max_tokens: int = MAX_TOKENS) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens))


class Hosts:
    """A prefill and a decode host in one process."""

    def __init__(self, lease_s: float = 60.0) -> None:
        network = MemoryNetwork()
        config = TransferConfig(deadline_s=5.0, lease_s=lease_s)
        self.engines = [Engine(tiny_model(), engine_config()) for _ in range(2)]
        self.prefill, self.decode = (
            EngineHost(role, engine, MemoryTransport(engine.pool, network), config)
            for role, engine in zip(("prefill", "decode"), self.engines, strict=True)
        )
        for host in (self.prefill, self.decode):
            host.start()

    async def settled(self, condition: Callable) -> None:
        deadline = time.monotonic() + 30
        while not all([condition(await host.info()) for host in (self.prefill, self.decode)]):
            assert time.monotonic() < deadline, "it never settled"
            await asyncio.sleep(0.01)
        for host in (self.prefill, self.decode):
            await host.check_integrity()

    def stop(self) -> None:
        for host in (self.prefill, self.decode):
            host.stop()


@pytest.fixture
def hosts():
    made = Hosts()
    yield made
    made.stop()


def idle(info) -> bool:
    return info.num_free == info.num_pages and info.num_requests == 0


async def collect(stream) -> tuple[list[int], list]:
    items = [item async for item in stream]
    return [token for item in items if isinstance(item, Tokens) for token in item.tokens], items


def test_many_split_requests_at_once_equal_generate(hosts):
    asked = prompts(3, 50, 17, 34, 60, 9)
    expected = [reference(tiny_model(), prompt, MAX_TOKENS) for prompt in asked]

    async def one(name: str, prompt: list[int]) -> list[int]:
        prefilled = await hosts.prefill.prefill(request(name, prompt))
        assert isinstance(prefilled, Prefilled)
        stream = hosts.decode.stream(request(name, prompt), (prefilled.token,), prefilled.ticket)
        tokens, items = await collect(stream)
        assert isinstance(items[0], Pulled)
        assert items[0].num_bytes == prefilled.ticket.num_bytes
        assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        return [prefilled.token, *tokens]

    async def run() -> None:
        answers = await asyncio.gather(*(one(f"r{i}", prompt) for i, prompt in enumerate(asked)))
        assert answers == expected
        await hosts.settled(idle)

    asyncio.run(run())


def test_a_reader_that_leaves_frees_everything_at_once(hosts):
    (prompt,) = prompts(40)

    async def run() -> None:
        async with aclosing(hosts.decode.stream(request("gone", prompt, 400), (), None)) as stream:
            async for _ in stream:
                break
        await hosts.settled(idle)

    asyncio.run(run())


def test_a_caller_that_leaves_while_its_ticket_is_on_its_way_leaves_no_lease_behind(hosts):
    (prompt,) = prompts(40)

    async def run() -> None:
        prefilled = await hosts.prefill.prefill(request("gone", prompt))
        other = await hosts.prefill.prefill(request("stays", prompt))
        await hosts.prefill.cancel("gone")
        assert (await hosts.prefill.info()).open_leases == 1
        assert not await hosts.prefill.release(prefilled.ticket.ticket_id)
        assert await hosts.prefill.release(other.ticket.ticket_id)
        await hosts.settled(idle)

    asyncio.run(run())


def test_a_lease_nobody_claims_is_taken_back():
    hosts = Hosts(lease_s=2.0)
    (prompt,) = prompts(40)

    async def run() -> None:
        prefilled = await hosts.prefill.prefill(request("r", prompt))
        assert isinstance(prefilled, Prefilled)
        assert (await hosts.prefill.info()).open_leases == 1
        await hosts.settled(idle)
        stream = hosts.decode.stream(request("r", prompt), (prefilled.token,), prefilled.ticket)
        (failed,) = (await collect(stream))[1]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, TransferError)
        assert "expired" in failed.error.reason
        await hosts.settled(idle)

    try:
        asyncio.run(run())
    finally:
        hosts.stop()


def test_a_bad_ticket_or_a_bad_request_fails_alone(hosts):
    good, prompt = prompts(20, 40)
    expected = reference(tiny_model(), good, MAX_TOKENS)

    async def run() -> None:
        prefilled = await hosts.prefill.prefill(request("bad", prompt))
        assert isinstance(prefilled, Prefilled)
        forged = replace(prefilled.ticket, layout="another model")
        answers = await asyncio.gather(
            collect(hosts.decode.stream(request("bad", prompt), (prefilled.token,), forged)),
            collect(hosts.decode.stream(request("good", good), (), None)),
            collect(hosts.decode.stream(request("empty", []), (), None)),
            collect(hosts.decode.stream(request("other", good), (prefilled.token,), prefilled.ticket)),
        )
        assert isinstance(answers[0][1][0].error, TransferError)
        assert answers[1][0] == expected
        assert isinstance(answers[2][1][0].error, RequestError)
        assert "ticket is for 40 tokens" in str(answers[3][1][0].error)
        assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled(idle)

    asyncio.run(run())


def test_a_decode_worker_without_room_says_so_within_the_deadline(hosts):
    (prompt,) = prompts(40)
    pool = hosts.engines[1].pool

    async def run() -> None:
        taken = await hosts.decode._call(lambda: pool.alloc(pool.num_free - 1))
        prefilled = await hosts.prefill.prefill(request("r", prompt))
        stream = hosts.decode.stream(request("r", prompt), (prefilled.token,), prefilled.ticket)
        (failed,) = (await collect(stream))[1]
        assert "no free pages" in str(failed.error)
        await hosts.decode._call(lambda: pool.free(taken))
        await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled(idle)

    asyncio.run(run())


def test_what_was_waited_for_free_pages_is_told_beside_what_the_transfer_took(hosts):
    first, second = prompts(40, 17)
    pool = hosts.engines[1].pool

    async def pulled(name: str, prompt: list[int]) -> Pulled:
        prefilled = await hosts.prefill.prefill(request(name, prompt))
        stream = hosts.decode.stream(request(name, prompt), (prefilled.token,), prefilled.ticket)
        items = (await collect(stream))[1]
        assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        assert isinstance(items[0], Pulled)
        return items[0]

    async def run() -> None:
        assert (await pulled("at once", first)).room_s == 0
        taken = await hosts.decode._call(lambda: pool.alloc(pool.num_free - 1))
        began_s = time.monotonic()
        waiting = asyncio.ensure_future(pulled("in vain at first", second))
        while not any(client.no_room_since_s for client in hosts.decode._loop._wanting_pages):
            assert time.monotonic() < began_s + 30, "it never waited"
            await asyncio.sleep(0.001)
        noticed_s = time.monotonic()
        for _ in range(20):
            assert not waiting.done()
            await hosts.decode.info()
        freed_s = time.monotonic()
        await hosts.decode._call(lambda: pool.free(taken))
        found = await waiting
        over_s = time.monotonic()
        assert freed_s - noticed_s <= found.room_s <= over_s - began_s
        assert found.room_s + found.seconds <= over_s - began_s
        assert found.seconds <= over_s - freed_s
        await hosts.settled(idle)

    asyncio.run(run())


def test_when_the_engine_breaks_everybody_is_told_and_the_host_reports_ill(hosts):
    (prompt,) = prompts(10)

    async def run() -> None:
        def explode() -> list:
            raise MemoryError("no memory")

        stream = hosts.decode.stream(request("r", prompt, 400), (), None)
        first = await anext(stream)
        assert isinstance(first, Tokens)
        hosts.engines[1].step = explode
        last = first
        async for item in stream:
            last = item
        assert isinstance(last, Failed)
        assert "MemoryError" in str(last.error)
        with pytest.raises(EngineError, match="MemoryError"):
            hosts.decode.check()
        hosts.prefill.check()

    asyncio.run(run())


def test_a_host_with_nothing_to_do_reports_ill_when_a_rank_of_its_engine_is_lost(hosts):
    class Alone:
        """A leader whose other ranks are gone."""

        lost = "rank 0 of 2: another rank is lost"

        def close(self) -> None:
            return None

    async def run() -> None:
        hosts.decode.check()
        hosts.engines[1].leader = Alone()
        ends_s = time.monotonic() + 30
        while hosts.decode._thread.is_alive():
            assert time.monotonic() < ends_s, "nobody noticed"
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="another rank is lost"):
            hosts.decode.check()

    asyncio.run(run())


def test_a_page_taken_behind_the_engines_back_is_noticed_when_it_has_nothing_to_do(hosts):
    (prompt,) = prompts(10)
    pool = hosts.engines[1].pool

    async def run() -> None:
        await hosts.decode._call(pool._free.pop)
        answer, _ = await collect(hosts.decode.stream(request("r", prompt), (), None))
        assert answer == reference(tiny_model(), prompt, MAX_TOKENS)
        ends_s = time.monotonic() + 30
        while hosts.decode._thread.is_alive():
            assert time.monotonic() < ends_s, "nobody noticed"
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="lost or doubly owned"):
            hosts.decode.check()
        with pytest.raises(EngineError, match="lost or doubly owned"):
            await hosts.decode.info()
        hosts.prefill.check()

    asyncio.run(run())


def test_pages_that_a_lease_holds_are_not_lost_and_are_looked_over_once(hosts):
    (prompt,) = prompts(40)
    engine = hosts.engines[0]
    held: list[int] = []
    look = engine.forgotten

    def counted(*claims, **more) -> list:
        held.append(engine.pool.num_held)
        return look(*claims, **more)

    async def run() -> None:
        engine.forgotten = counted
        prefilled = await hosts.prefill.prefill(request("r", prompt))
        ends_s = time.monotonic() + 30
        while not held:
            assert time.monotonic() < ends_s, "nobody looked"
            await asyncio.sleep(0.01)
        # Whoever asks how it stands changes no page.
        for _ in range(20):
            assert (await hosts.prefill.info()).open_leases == 1
        hosts.prefill.check()
        assert held == [len(prefilled.ticket.pages)]
        assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        await hosts.settled(idle)
        hosts.prefill.check()

    asyncio.run(run())


def keeps_its_answers_pages(hosts: Hosts) -> None:
    hosts.engines[1]._holdings.release = lambda sequence: None


def keeps_untaken_prompts(hosts: Hosts) -> None:
    loop = hosts.prefill._loop
    loop._prefilled = lambda client, event: Prefilled(event.token, "length", None, 0.0)


class ForgetfulLeases(LeaseTable):
    """Knows nothing any more of a ticket that is given back or over, and keeps its pages."""

    def release(self, ticket_id: str) -> bool:
        return self._open.pop(ticket_id, None) is not None


def keeps_leases(hosts: Hosts) -> None:
    hosts.prefill._loop._leases.__class__ = ForgetfulLeases


def keeps_arrivals(hosts: Hosts) -> None:
    adopt = hosts.engines[1].adopt

    def adopt_a_copy(request_id, prompt, params, answered, pages, **more) -> None:
        copies = hosts.engines[1].pool.alloc(len(pages), "whoever adopts")
        hosts.engines[1].pool.storage_PB[copies] = hosts.engines[1].pool.storage_PB[pages]
        adopt(request_id, prompt, params, answered, copies, **more)

    hosts.engines[1].adopt = adopt_a_copy


@pytest.mark.parametrize(
    ("forget", "where", "taker"),
    [
        (keeps_its_answers_pages, "decode", "request r"),
        (keeps_untaken_prompts, "prefill", "request r"),
        (keeps_leases, "prefill", "the lease of request r"),
        (keeps_arrivals, "decode", "the transfer of request r"),
    ],
)
@pytest.mark.parametrize("how", ["given back", "expired"])
def test_an_owner_that_forgets_to_free_is_found_when_there_is_nothing_to_do(forget, where, taker, how, caplog):
    hosts = Hosts(lease_s=60.0 if how == "given back" else 1.0)
    (prompt,) = prompts(40)
    forget(hosts)

    async def run() -> None:
        one = request("r", prompt)
        prefilled = await hosts.prefill.prefill(one)
        answer, _ = await collect(hosts.decode.stream(one, (prefilled.token,), prefilled.ticket))
        if forget is not keeps_untaken_prompts:
            assert [prefilled.token, *answer] == reference(tiny_model(), prompt, MAX_TOKENS)
            if how == "given back":
                assert await hosts.prefill.release(prefilled.ticket.ticket_id)
        host, engine = (hosts.prefill, hosts.engines[0]) if where == "prefill" else (hosts.decode, hosts.engines[1])
        ends_s = time.monotonic() + 30
        while not (found := (await host.info()).num_forgotten):
            assert time.monotonic() < ends_s, "nobody found them"
            await asyncio.sleep(0.01)
        page = next(page for page in range(engine.pool.num_pages) if engine.pool.holders(page))
        said = f"page {page} (epoch {engine.pool.epoch(page)}, last taken by {taker})"
        assert said in caplog.text
        with pytest.raises(EngineError, match=re.escape(said)):
            await host.check_integrity()
        # Nobody is in danger: it goes on, with less room.
        host.check()
        assert found == engine.pool.num_held

    try:
        asyncio.run(run())
    finally:
        hosts.stop()


def test_pages_are_looked_over_once_after_they_changed_hands_and_not_more_often_than_allowed():
    watch = PageWatch(every_s=5.0)
    assert not watch.is_due(0.0)
    watch.changed()
    assert watch.is_due(1.0)
    assert not watch.is_due(100.0)
    watch.changed()
    assert watch.is_due(101.0)
    watch.changed()
    assert [watch.is_due(now_s) for now_s in (102.0, 105.9, 106.0, 120.0)] == [False, False, True, False]


def test_whoever_still_waits_in_the_queue_when_the_engine_dies_is_told(hosts):
    (prompt,) = prompts(10)
    host = hosts.decode

    async def run() -> None:
        held, go = threading.Event(), threading.Event()

        def die() -> list:
            held.set()
            assert go.wait(timeout=30)
            raise MemoryError("no memory")

        hosts.engines[1].step = die
        running = asyncio.ensure_future(collect(host.stream(request("running", prompt), (), None)))
        await asyncio.to_thread(held.wait, 30)
        # The thread is inside its last step: these are left in the queue.
        late = asyncio.ensure_future(collect(host.stream(request("late", prompt), (), None)))
        calls = [asyncio.ensure_future(call) for call in (host.info(), host.cancel("late"), host.release("t"))]
        await asyncio.sleep(0)
        go.set()
        async with asyncio.timeout(30):
            for stream in (running, late):
                (failed,) = (await stream)[1]
                assert "MemoryError" in str(failed.error)
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, EngineError)

    asyncio.run(run())


def test_whoever_passes_the_check_just_before_the_engine_dies_is_told(hosts):
    (prompt,) = prompts(10)
    host = hosts.decode
    host.stop()
    # As seen by a caller whose look at the thread came before its end.
    host.check = lambda: None

    async def run() -> None:
        async with asyncio.timeout(30):
            with pytest.raises(EngineError, match="stopped"):
                await collect(host.stream(request("late", prompt), (), None))
            with pytest.raises(EngineError, match="stopped"):
                await host.info()

    asyncio.run(run())


def test_a_caller_whose_event_loop_is_gone_harms_nobody(hosts):
    (prompt,) = prompts(20)
    expected = reference(tiny_model(), prompt, MAX_TOKENS)

    async def ask_and_leave() -> None:
        client = hosts.decode.stream(request("gone", prompt, 400), (), None)
        await anext(client)
        # Never closed: the engine goes on telling a loop that has ended.
        kept.append(client)
        hooks = asyncio.get_running_loop()
        hooks._asyncgens.clear()

    kept: list = []
    asyncio.run(ask_and_leave())
    tokens, _ = asyncio.run(collect(hosts.decode.stream(request("next", prompt), (), None)))
    assert tokens == expected


def test_an_engine_whose_pages_are_all_held_elsewhere_waits_without_spinning(hosts):
    (prompt,) = prompts(40)
    engine = hosts.engines[1]
    expected = reference(tiny_model(), prompt, MAX_TOKENS)
    steps: list[int] = []
    step = engine.step

    def counted() -> list:
        events = step()
        steps.append(len(events))
        return events

    async def run() -> None:
        engine.step = counted
        taken = await hosts.decode._call(lambda: engine.pool.alloc(engine.pool.num_free))
        answer = asyncio.ensure_future(collect(hosts.decode.stream(request("r", prompt), (), None)))
        deadline = time.monotonic() + 30
        while not engine.stalled:
            assert time.monotonic() < deadline, "it never had to wait"
            await asyncio.sleep(0.005)
        before, began = len(steps), time.monotonic()
        await asyncio.sleep(0.5)
        most = (time.monotonic() - began) / 0.01 + 5
        assert len(steps) - before <= most
        await hosts.decode._call(lambda: engine.pool.free(taken))
        assert (await answer)[0] == expected
        await hosts.settled(idle)

    asyncio.run(run())
