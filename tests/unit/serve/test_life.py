"""A worker that is frozen is lost after a while, and one that only takes long is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import RayServeException

from farspan.engine.request import SamplingParams
from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer, SourceAddress
from farspan.serve.load import WorkerLoad
from farspan.serve.mailbox import Inbox
from farspan.serve.messages import Alive, Failed, GenerationRequest, Tokens
from farspan.serve.policy import Place
from farspan.serve.quotas import Orders
from farspan.serve.router import Router

SILENT_S = 0.2
REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=2))
FIRST, LAST = Tokens((7,), None), Tokens((8,), "length")
HANGS = "nothing more, for ever"
OFFER = KvOffer("t", "r", SourceAddress("memory", "i", b"", 0, 0, 4), 0, (), 3, "layout", 64, 1e12)
FROZEN = Place("decode", "frozen")


class Call:
    """A call that says its items; a number is a pause in seconds."""

    def __init__(self, *items: object) -> None:
        self._items, self.cancelled = items, False

    async def __aiter__(self) -> AsyncIterator[object]:
        for item in self._items:
            if item == HANGS:
                await asyncio.Event().wait()
            elif isinstance(item, Exception):
                raise item
            elif isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment that answers every call alike, and says how `loads` stand."""

    def __init__(self, call: Call, *loads: WorkerLoad) -> None:
        self.call, self.loads = call, loads
        self.resume = SimpleNamespace(remote=lambda *_: call)
        # What goes by a stream for several answers is another test's (test_trunk.py).
        self.carry = SimpleNamespace(remote=lambda *_: Call())
        self.prefill_in_parts = SimpleNamespace(choose_replica=self.choose_replica)

    def options(self, **_: object) -> Handle:
        return self

    def choose_replica(self, *_: object) -> Handle:
        return self

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_: object) -> None:
        return None

    def dispatch(self, *_: object) -> Call:
        return self.call

    def broadcast(self, *_: object) -> Handle:
        return self

    async def results_async(self, **_: object) -> list[WorkerLoad]:
        if not self.loads:
            raise RayServeException("no replica")
        return list(self.loads)


def nobody(_: WorkerLoad, __: float) -> None:
    return None


def load(worker: str, deployment: str = "decode") -> WorkerLoad:
    sizes = {"page_tokens": 16, "token_bytes": 1.0, "max_batch_tokens": 8, "max_sequences": 8}
    return WorkerLoad(
        worker=worker, deployment=deployment, incarnation="1", kind="k", weights="w", layout="l", **sizes
    )  # fmt: skip


def resumed(call: Call, *heard: str, place: Place | None = None, silent_s: float = SILENT_S) -> list[object]:
    """What a resumed answer consists of, while some workers are heard of again and again."""

    async def run() -> list[object]:
        router = Router(Handle(Call()), Handle(call, *(load(worker) for worker in heard)), silent_s)
        await router.reports({}, nobody)
        hearing = asyncio.ensure_future(hear(router))
        try:
            async with asyncio.timeout(30):
                return [item async for item in router.resume(REQUEST, (), None, place)]
        finally:
            hearing.cancel()

    async def hear(router: Router) -> None:
        while True:
            await asyncio.sleep(silent_s / 10)
            await router.reports({}, nobody)

    return asyncio.run(run())


def test_a_worker_that_falls_silent_in_an_answer_is_lost_and_its_call_is_given_up() -> None:
    call, began_s = Call(Alive(), FIRST, HANGS), time.monotonic()
    first, failed = resumed(call, "other", place=FROZEN)
    assert first == FIRST
    assert isinstance(failed, Failed)
    assert str(failed.error) == "the decode worker was silent for 0.2 s"
    assert call.cancelled
    assert time.monotonic() - began_s >= SILENT_S


def test_a_worker_that_is_there_may_take_as_long_as_it_needs() -> None:
    pulses = [item for _ in range(3) for item in (Alive(), 0.4)]
    assert resumed(Call(*pulses, FIRST, LAST), silent_s=1.0) == [FIRST, LAST]


def test_a_call_that_waits_in_a_queue_is_not_taken_for_a_silent_worker() -> None:
    assert resumed(Call(3 * SILENT_S, Alive(), LAST), "busy", "other", place=Place("decode", "busy")) == [LAST]
    # Nobody else is there, and it may wake; or it is anybody's.
    assert resumed(Call(3 * SILENT_S, Alive(), LAST), place=FROZEN) == [LAST]
    assert resumed(Call(3 * SILENT_S, Alive(), LAST), "other") == [LAST]


def test_a_call_whose_worker_is_heard_of_no_more_goes_elsewhere_when_others_are() -> None:
    call = Call(HANGS)
    (failed,) = resumed(call, "other", place=FROZEN)
    assert isinstance(failed, Failed)
    assert "the decode worker was silent" in str(failed.error)
    assert call.cancelled


LOSSES = [
    ActorUnavailableError("the connection was reset", None),
    AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata(), details="RST_STREAM"),
    RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): Socket closed."),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_whatever_ray_or_grpc_calls_the_end_of_a_connection_it_is_the_loss_of_a_worker(loss: Exception) -> None:
    first, failed = resumed(Call(Alive(), FIRST, loss))
    assert first == FIRST
    assert isinstance(failed, Failed)
    assert str(failed.error) == f"the decode worker was lost: {type(loss).__name__}"


def test_no_call_of_a_worker_is_cancelled_with_the_request_it_is_made_for() -> None:
    """Serve cancels what was begun in a request's context, also what gives back what the request held."""
    asking = ContextVar("asking", default="nobody")
    begun: list[str] = []

    class Noting:
        """A deployment that notes on whose behalf its calls are begun."""

        def options(self, **_: object) -> Noting:
            return self

        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *_: self.call(method), choose_replica=self.chosen)

        @asynccontextmanager
        async def chosen(self, *_: object) -> AsyncIterator[Any]:
            yield SimpleNamespace(replica_id="d")

        def call(self, method: str) -> Call:
            begun.append(f"{method} by {asking.get()}")
            return Call(Alive()) if method == "carry" else Call(Alive(), LAST)

        def dispatch(self, *_: object) -> Call:
            begun.append(f"dispatch by {asking.get()}")
            return Call(Alive(), OFFER, Failed(ClusterError("lost")))

        def broadcast(self, method: str, *_: object) -> Noting:
            begun.append(f"{method} by {asking.get()}")
            return self

        async def results_async(self, **_: object) -> list[bool]:
            return []

    async def run() -> None:
        asking.set("a request")
        router = Router(Noting(), Noting(), SILENT_S)
        await router.prefill(REQUEST)
        while "follow by nobody" not in begun:
            await asyncio.sleep(0)
        assert [item async for item in router.resume(REQUEST, (), None)] == [LAST]
        router.release("t")
        router.cancel("r")
        await asyncio.sleep(0)

    asyncio.run(run())
    assert {each.split()[0] for each in begun} == {"dispatch", "follow", "carry", "resume", "release", "cancel"}
    assert all(each.endswith(" by nobody") for each in begun), begun


def test_a_prefill_worker_that_falls_silent_is_lost_whatever_it_offered() -> None:
    async def run() -> None:
        call = Call(Alive(), OFFER, HANGS)
        router = Router(Handle(call), Handle(Call()), SILENT_S)
        async with asyncio.timeout(30):
            failed = await router.prefill(REQUEST)
        assert isinstance(failed, Failed)
        assert str(failed.error) == "the prefill worker was silent for 0.2 s"
        assert call.cancelled
        router.cancel(REQUEST.request_id)
        await asyncio.sleep(0)
        assert router._relays == {}

    asyncio.run(run())


def test_a_stream_with_nothing_to_say_says_that_it_is_alive() -> None:
    async def run() -> None:
        inbox = Inbox()
        assert await inbox.take(0.01) == Alive()
        inbox.push(FIRST)
        assert await inbox.take(30.0) == FIRST
        assert await inbox.take(0.01) == Alive()

    asyncio.run(run())


@pytest.mark.parametrize("others", [(), ("b",)])
def test_a_worker_that_is_gone_is_known_to_be_gone_when_its_role_is_asked_next(others) -> None:
    """Nobody waits for it to be silent, nor for another in its place."""

    async def run() -> None:
        decode = Handle(Call(HANGS), load("a"), *map(load, others))
        router = Router(Handle(Call(), load("p", "prefill")), decode, silent_s=60.0)
        assert await router.reports({}, nobody) == set()
        decode.loads = tuple(map(load, others))
        assert not router._is_lost(Place("decode", "a"))
        assert await router.reports({}, nobody) == {"a"}
        assert await router.reports({}, nobody) == set()
        assert router._is_lost(Place("decode", "a"))
        assert not router._is_lost(Place("prefill", "p"))

    asyncio.run(run())


def test_workers_are_heard_of_while_one_of_them_is_frozen() -> None:
    class OneFrozen(Handle):
        def options(self, session_id: str = "", **_: object) -> Any:
            if not session_id:
                return self
            return SimpleNamespace(report=SimpleNamespace(remote=lambda _: self.one(session_id)))

        async def results_async(self, **_: object) -> list[WorkerLoad]:
            raise TimeoutError

        async def one(self, name: str) -> WorkerLoad:
            if name == "frozen":
                await asyncio.Event().wait()
            return load(name)

    async def run() -> None:
        heard: dict[str, float] = {}
        router = Router(Handle(Call()), OneFrozen(Call()), SILENT_S)
        asking = asyncio.ensure_future(
            router.reports(
                {name: Orders() for name in ("a", "frozen", "b")},
                lambda load, asked_at_s: heard.update({load.worker: asked_at_s}),
            )
        )
        async with asyncio.timeout(30):
            while len(heard) < 2:
                await asyncio.sleep(0)
        # The others' answers do not wait for it.
        assert not asking.done()
        asking.cancel()
        assert heard.keys() == {"a", "b"}

    asyncio.run(run())
