"""One stream carries the tokens of all answers between a worker and an ingress, and loses none of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from contextvars import ContextVar
from typing import Any

import pytest
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model
from tests.unit.serve.wire import Deployment, Replica

from farspan.config.schema import TransferConfig
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.errors import ClusterError, EngineError
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve.host import EngineHost
from farspan.serve.life import Watch
from farspan.serve.line import Line, Lines, followed
from farspan.serve.mailbox import Inbox, Outbox
from farspan.serve.messages import Alive, Bundle, Elsewhere, Failed, GenerationRequest, Pulled, Tokens
from farspan.serve.policy import Place
from farspan.serve.router import Router
from farspan.serve.trunk import Trunk, Trunks

MAX_TOKENS, PULSE_S = 24, 0.5
ASKED = prompts(40, 17, 33, 9, 21, 28)
HERE = Place("decode", "d")


@pytest.fixture(scope="module")
def host():
    engine = Engine(tiny_model(), engine_config(max_batch_tokens=64))
    made = EngineHost("decode", engine, MemoryTransport(engine.pool, MemoryNetwork()), TransferConfig(), PULSE_S)
    made.start()
    yield made
    made.stop()


def run(work: Callable[[], Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(bounded())


def request(number: int, max_tokens: int = MAX_TOKENS) -> GenerationRequest:
    return GenerationRequest(f"r{number}", tuple(ASKED[number]), SamplingParams(max_tokens=max_tokens))


async def told(router: Router, number: int) -> list[int]:
    items = [item async for item in router.resume(request(number), (), None, HERE)]
    assert all(isinstance(item, Tokens) for item in items), items
    return [token for item in items for token in item.tokens]


async def forgotten(host: EngineHost) -> None:
    while (info := await host.info()).num_requests or info.num_free < info.num_pages:
        await asyncio.sleep(0.01)
    await host.check_integrity()


class Counted(Replica):
    """A worker that counts what it says, by what it is."""

    def __init__(self, host: EngineHost) -> None:
        super().__init__("d", "decode", host, PULSE_S)
        self.said: list[Any] = []

    async def resumed(self, *arguments: Any) -> AsyncIterator[Any]:
        async for item in super().resumed(*arguments):
            self.said.append(item)
            yield item


def test_answers_side_by_side_are_transformers_and_take_a_message_an_iteration(host):
    async def work() -> None:
        replica = Counted(host)
        router = Router(Deployment(), Deployment(replica))
        answers = await asyncio.gather(*(told(router, number) for number in range(len(ASKED))))
        assert answers == [reference(tiny_model(), prompt, MAX_TOKENS) for prompt in ASKED]
        by_call = [item for item in replica.said if isinstance(item, Tokens)]
        assert not by_call
        assert sum(isinstance(item, Elsewhere) for item in replica.said) == len(ASKED)
        # One line for all of them; each answer had its own messages before.
        (carry,) = (call for call in replica.calls if call.carries)
        assert MAX_TOKENS <= carry.num_bundles < 2 * MAX_TOKENS
        await forgotten(host)

    run(work)


def test_without_an_open_trunk_all_of_an_answer_comes_by_its_own_call(host):
    async def work() -> None:
        trunk = Trunk(0.0)
        items = [item async for item in host.stream(request(0), (), None, trunk)]
        assert [token for item in items if isinstance(item, Tokens) for token in item.tokens] == reference(
            tiny_model(), ASKED[0], MAX_TOKENS
        )

    run(work)


def test_a_request_whose_trunk_breaks_off_hears_it_by_its_call_and_is_forgotten(host):
    async def work() -> None:
        trunks = Trunks(PULSE_S)
        carried = trunks.opened("t")
        assert await anext(carried) == Alive()
        bundles = asyncio.ensure_future(anext(carried))
        await asyncio.sleep(0)
        with trunks.rider("t") as trunk:
            stream = host.stream(request(0, 300), (), None, trunk)
            assert isinstance(await anext(stream), Elsewhere)
            assert isinstance(await bundles, Bundle)
            await carried.aclose()
            failed = await anext(stream)
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, ClusterError)
            assert [item async for item in stream] == []
        assert trunks._known == {}
        await forgotten(host)

    run(work)


def test_a_client_that_leaves_frees_everything_while_its_tokens_go_by_the_trunk(host):
    async def work() -> None:
        replica = Replica("d", "decode", host, PULSE_S)
        router = Router(Deployment(), Deployment(replica))
        staying = asyncio.ensure_future(told(router, 1))
        async with aclosing(router.resume(request(0, 300), (), None, HERE)) as items:
            async for _ in items:
                break
        # Nobody else notices.
        assert await staying == reference(tiny_model(), ASKED[1], MAX_TOKENS)
        await forgotten(host)

    run(work)


def test_a_trunk_says_that_it_is_alive_and_ends_when_nobody_rode_for_a_pulse():
    async def work() -> None:
        trunks = Trunks(PULSE_S)
        opened = trunks.opened("t")
        with trunks.rider("t"):
            assert [await anext(opened) for _ in range(3)] == [Alive()] * 3
        assert [item async for item in opened] == []
        assert trunks._known == {}

    run(work)


def given(token: int, finish: str | None = None) -> Tokens:
    return Tokens((token,), finish)


def test_what_begins_or_ends_an_answer_waits_for_nothing_and_all_others_wait_on(monkeypatch):
    monkeypatch.setattr("farspan.serve.trunk._SPACING_S", 3600.0)

    async def work() -> None:
        trunk, inboxes = Trunk(3600.0), {name: Inbox() for name in "ab"}
        bundles = trunk.bundles(0.01)
        trunk.divert("a", inboxes["a"], given(1))
        assert await anext(bundles) == Bundle((("a", given(1)),))
        waiting = asyncio.ensure_future(anext(bundles))
        for token in (2, 3):
            inboxes["a"].put(given(token))
            # For pulses: what is kept is neither silence nor a reason to tell it.
            await asyncio.wait((waiting,), timeout=0.05)
            assert not waiting.done()
        trunk.divert("b", inboxes["b"], given(7))
        assert await waiting == Bundle((("b", given(7)),))
        inboxes["b"].put(given(8))
        inboxes["a"].put(given(4, "length"))
        assert await anext(bundles) == Bundle((("a", given(2)), ("a", given(3)), ("a", given(4, "length"))))
        inboxes["b"].put(given(9, "stop"))
        assert await anext(bundles) == Bundle((("b", given(8)), ("b", given(9, "stop"))))
        await bundles.aclose()

    run(work)


@pytest.mark.parametrize(
    ("num_answers", "iteration_s", "together"),
    [(1, 2.0, 1), (1, 0.3, 3), (20, 19.0, 1), (20, 5.0, 4), (20, 6.0, 3), (60, 15.0, 3), (60, 39.0, 1)],
)
def test_messages_are_iterations_at_a_distance_that_grows_with_the_answers_up_to_the_longest(
    num_answers, iteration_s, together, monkeypatch
):
    monkeypatch.setattr("farspan.serve.trunk._SPACING_S", 1.0)

    async def work() -> None:
        now_s = 1000.0
        trunk = Trunk(40.0, lambda: now_s)
        bundles = trunk.bundles(60.0)
        inboxes = [Inbox() for _ in range(num_answers)]
        for number, inbox in enumerate(inboxes):
            trunk.divert(str(number), inbox, given(0))
        told, waiting = [await anext(bundles)], asyncio.ensure_future(anext(bundles))
        for step in range(1, 3 * together + 1):
            now_s += iteration_s
            for inbox in inboxes:
                inbox.put(given(step))
            for _ in range(10):
                await asyncio.sleep(0)
            if waiting.done():
                told.append(waiting.result())
                assert step % together == 0
                waiting = asyncio.ensure_future(anext(bundles))
        assert [len(bundle.items) for bundle in told] == [num_answers] + 3 * [num_answers * together]
        await abandoned(waiting, bundles)

    run(work)


async def abandoned(waiting: asyncio.Future[Any], bundles: AsyncGenerator[Any]) -> None:
    waiting.cancel()
    await asyncio.wait((waiting,))
    await bundles.aclose()


@pytest.mark.parametrize("longest_s", [0.0, 0.05])
def test_kept_tokens_follow_by_themselves_when_their_time_is_over(longest_s, monkeypatch):
    monkeypatch.setattr("farspan.serve.trunk._SPACING_S", 3600.0)

    async def work() -> None:
        trunks, inbox = Trunks(PULSE_S, longest_s), Inbox()
        opened = trunks.opened("t")
        assert await anext(opened) == Alive()
        with trunks.rider("t") as trunk:
            trunk.divert("a", inbox, given(1))
            assert await anext(opened) == Bundle((("a", given(1)),))
            inbox.put(given(2))
            waiting = asyncio.ensure_future(anext(opened))
            for _ in range(10):
                await asyncio.sleep(0)
            # Nothing follows that could press it.
            assert waiting.done() == (longest_s == 0)
            assert await waiting == Bundle((("a", given(2)),))
        await opened.aclose()

    run(work)


class Said:
    """A call that says some items, then raises or says nothing more."""

    def __init__(self, *items: Any, ends: Exception | None = None) -> None:
        self.items, self.ends, self.cancelled = items, ends, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            yield item
        if self.ends is not None:
            raise self.ends
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("ends", [None, ClusterError("the worker was lost")])
def test_whoever_rides_a_line_that_is_silent_or_breaks_is_told_after_what_came_before(ends):
    async def work() -> None:
        first = Tokens((7,), None)
        call = Said(Alive(), Bundle((("a", first), ("nobody", first))), ends=ends)
        line = Line("t", call, Watch("the decode worker", 0.1))
        with ExitStack() as riding:
            a, b = (riding.enter_context(line.rider(name)) for name in "ab")
            assert await a.take() == first
            for inbox in (a, b):
                failed = await inbox.take()
                assert isinstance(failed, Failed)
                assert ("silent" if ends is None else "lost") in str(failed.error)
        assert line.over
        assert call.cancelled
        with line.rider("late") as inbox:
            assert isinstance(await inbox.take(), Failed)

    run(work)


def test_what_a_call_says_comes_before_the_line_and_its_loss_ends_the_answer():
    pulled, first, lost = Pulled(1, 2, 3.0, "memory"), Tokens((7,), None), Failed(EngineError("gone"))

    async def work() -> None:
        async def said() -> AsyncIterator[Any]:
            yield pulled
            yield Elsewhere()
            await told_first.wait()
            yield lost

        told_first, inbox = asyncio.Event(), Inbox()
        inbox.put(first)
        items = followed(said(), inbox)
        assert [await anext(items), await anext(items)] == [pulled, first]
        told_first.set()
        assert [item async for item in items] == [lost]

    run(work)


def test_a_line_is_shared_and_belongs_to_no_request_until_it_is_over():
    asking = ContextVar("asking", default="nobody")

    async def work() -> None:
        begun: list[tuple[str, str]] = []
        calls = [Said(Alive()), Said(ends=ClusterError("the worker was lost"))]

        def call(name: str) -> Said:
            begun.append((name, asking.get()))
            return calls[len(begun) % 2]

        asking.set("a request that may be cancelled")
        lines, watch = Lines(), Watch("the decode worker", 30.0)
        first = lines.of("d", call, watch)
        assert lines.of("d", call, watch) is first
        while not first.over:
            await asyncio.sleep(0)
        second = lines.of("d", call, watch)
        assert begun == [(first.name, "nobody"), (second.name, "nobody")]
        assert first.name != second.name

    run(work)


def test_what_an_engine_has_for_many_readers_wakes_their_loop_once():
    async def work() -> None:
        loop, outbox = asyncio.get_running_loop(), Outbox()
        inboxes = [Inbox() for _ in range(5)]
        woken, wake = 0, loop.call_soon_threadsafe

        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments, **more)

        def engine() -> None:
            for number, inbox in enumerate(inboxes):
                outbox.put(inbox, Tokens((number,), None))
                outbox.put(inbox, Tokens((number + 10,), "length"))
            outbox.send()
            outbox.send()

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        thread = threading.Thread(target=engine)
        thread.start()
        thread.join()
        assert woken == 1
        assert [await inbox.take() for inbox in inboxes] == [Tokens((n, n + 10), "length") for n in range(5)]

    run(work)
