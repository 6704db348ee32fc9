"""An answer is told to its end, or ends in a way that no client takes for an answer."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from farspan.errors import ClusterError
from farspan.serve.calls import Said
from farspan.serve.chat import Delta
from farspan.serve.choices import ClientGoneError, merged, unless_gone
from farspan.serve.messages import Failed, WorkerInfo
from farspan.serve.reply import Counted, Prompted, Reply, Step, Style
from farspan.serve.router import Router, _Heard
from farspan.serve.stream import events
from farspan.serve.wire import CompletionRequest

ASKED = CompletionRequest(model="m", prompt="x")


def test_a_stream_that_breaks_ends_with_an_error_event_and_without_done():
    def step(text: str, first: bool) -> Step:
        return Step(Delta(text, None, 1), Said(text), Prompted((1,)), first, None)

    async def steps():
        yield step("rest", False)
        raise ZeroDivisionError("sk-secret")

    async def run() -> list[str]:
        style = Style(chat=True)
        told = events(step("a", True), steps(), Reply("r", "m", style, None), Counted(3, style), ASKED)
        return [event async for event in told]

    found = asyncio.run(run())
    codes = [json.loads(event.removeprefix("data: ")).get("error", {}).get("code") for event in found]
    assert codes == [None, None, "internal_error"]
    assert not any("sk-secret" in event for event in found)


async def endless(log: list[str], index: int = 0):
    try:
        for number in range(1_000_000):
            yield Delta(str(number), None, number, index=index)
            await asyncio.sleep(0)
    finally:
        log.append("closed")


def test_side_by_side_each_answer_keeps_its_order_and_the_first_failure_closes_the_others():
    log: list[str] = []

    async def failing():
        for number in range(5):
            yield Delta(str(number), None, number, index=1)
            await asyncio.sleep(0)
        raise ValueError("broken")

    async def run() -> list[Delta]:
        found: list[Delta] = []

        async def read() -> None:
            async for delta in merged([endless(log), failing(), endless(log, 2)]):
                found.append(delta)

        with pytest.raises(ValueError, match="broken"):
            await read()
        return found

    found = asyncio.run(run())
    assert log == ["closed", "closed"]
    assert [delta.text for delta in found if delta.index == 1] == list("01234")
    others = [int(delta.text) for delta in found if delta.index == 0]
    assert others == list(range(len(others)))


def test_a_call_that_was_given_up_elsewhere_ends_all_answers_with_an_error():
    log: list[str] = []

    async def given_up():
        yield Delta("a", None, 1)
        raise asyncio.CancelledError

    async def run() -> None:
        async with asyncio.timeout(20):
            with pytest.raises(ClusterError, match="given up"):
                async for _ in merged([endless(log), given_up()]):
                    pass

    asyncio.run(run())
    assert log == ["closed"]


def test_a_workers_call_that_was_given_up_is_a_failure_and_our_own_end_is_not():
    class Handle:
        """A deployment's handle whose calls are given up, or never end."""

        def __init__(self, gives_up: bool) -> None:
            self.gives_up, self.cancelled = gives_up, 0
            self.resume = self.info = SimpleNamespace(remote=self.call)

        def options(self, **_: bool) -> Handle:
            return self

        def call(self, *_: object) -> Handle:
            return self

        broadcast = call

        async def results_async(self, **_: object) -> None:
            await self.wait()

        def cancel(self) -> None:
            self.cancelled += 1

        async def wait(self) -> None:
            if self.gives_up:
                raise asyncio.CancelledError
            await asyncio.Event().wait()

        def __await__(self):
            return self.wait().__await__()

        async def __aiter__(self):
            await self.wait()
            yield None

    async def run() -> None:
        asked = SimpleNamespace(request_id="r")
        router = Router(Handle(True), Handle(True))
        failed = [item async for item in router.resume(asked, (), None)]
        assert [type(item) for item in failed] == [Failed]
        with pytest.raises(ClusterError, match="given up"):
            await router.info()
        endless_call = Handle(False)
        router = Router(endless_call, endless_call)
        reading = asyncio.ensure_future(anext(router.resume(asked, (), None)))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert endless_call.cancelled == 1

    asyncio.run(run())


def test_while_one_kind_of_worker_is_away_the_other_is_told_of() -> None:
    info = WorkerInfo("decode", 1, "layout", 97, 512, 400, 100, 100, 0, 0, 0)

    class Handle:
        def __init__(self, answer: WorkerInfo | Exception) -> None:
            self.answer = answer

        def options(self, **_: bool) -> Handle:
            return self

        def broadcast(self, _: str) -> Handle:
            return self

        async def results_async(self, **_: object) -> list[WorkerInfo]:
            if isinstance(self.answer, Exception):
                raise self.answer
            return [self.answer]

    async def run() -> None:
        dead = Handle(RayError("gone"))
        assert await Router(dead, Handle(info)).info() == [info]
        with pytest.raises(ClusterError, match="no worker answers: RayError; RayError"):
            await Router(dead, dead).info()

    asyncio.run(run())


def test_all_workers_are_told_of_none_where_there_is_none_and_each_alone_where_one_of_them_hangs() -> None:
    infos = [WorkerInfo("decode", n, "layout", 97, 512, 400, 100, 100, 0, 0, 0, worker=str(n)) for n in range(3)]

    class Handle:
        """Workers by name; one that hangs keeps the others' answers back where all are asked at once."""

        def __init__(self, workers: list[WorkerInfo], hangs: str = "", asked: str = "") -> None:
            self.workers, self.hangs, self.asked = workers, hangs, asked
            self.info = SimpleNamespace(remote=self.one)

        def options(self, session_id: str = "", **_: bool) -> Handle:
            return Handle(self.workers, self.hangs, session_id)

        def broadcast(self, _: str) -> Handle:
            return self

        async def results_async(self, **_: object) -> list[WorkerInfo]:
            if not self.workers:
                raise DeploymentUnavailableError(DeploymentID("decode"))
            if self.hangs:
                raise TimeoutError
            return self.workers

        async def one(self) -> WorkerInfo:
            if self.asked == self.hangs:
                await asyncio.Event().wait()
            return next((info for info in self.workers if info.worker == self.asked), self.workers[0])

    async def run() -> None:
        nobody = Handle([])
        assert await Router(nobody, nobody).info() == []
        assert await Router(nobody, Handle(infos)).info() == infos
        router = Router(nobody, Handle(infos, "1"))
        for worker in ("0", "1", "2", "gone"):
            router._heard[worker] = _Heard(worker, "decode", 0.0)
        assert await router.info() == [infos[0], infos[2]]

    asyncio.run(run())


def test_a_reader_that_stops_reading_holds_every_answer_back_and_closes_it_when_it_leaves():
    log: list[str] = []

    async def run() -> None:
        stream = merged([endless(log), endless(log)])
        last = 0
        async for delta in stream:
            await asyncio.sleep(0.001)
            last = max(last, int(delta.text))
            if last > 20:
                break
        await stream.aclose()
        assert last < 40
        assert log == ["closed", "closed"]

    asyncio.run(run())


def test_work_ends_when_its_client_leaves_and_its_value_comes_when_the_client_stays():
    async def run() -> None:
        gone, ended = asyncio.Event(), []

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work():
            try:
                gone.set()
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        with pytest.raises(ClientGoneError):
            await unless_gone(receive, work())
        assert ended == [True]
        gone.clear()
        assert await unless_gone(receive, asyncio.sleep(0, "value")) == "value"

    asyncio.run(run())


def test_a_long_prompt_is_tokenized_while_others_are_served(served):
    released = threading.Event()
    tokenizer = served.api._tokenizer

    class Slow:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **more):
            # Ends only when somebody else was answered meanwhile.
            assert released.wait(timeout=30)
            return tokenizer(text, **more)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    async def work(client):
        body = {"model": "tiny", "prompt": "slow", "max_tokens": 1}
        slow = asyncio.ensure_future(client.completions.create(**body))
        quick = await client.completions.create(**{**body, "prompt": [5, 6]})
        released.set()
        return quick, await slow

    served.api._tokenizer = Slow()
    try:
        quick, slow = served.ask(work)
    finally:
        served.api._tokenizer = tokenizer
    assert (quick.usage.prompt_tokens, slow.usage.completion_tokens) == (2, 1)


def test_a_prompt_longer_than_the_model_takes_is_refused_before_it_travels(served):
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": [1] * 8192})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "the prompt has 8192 tokens, the model takes at most 8191"
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    chat = served.post("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "é" * 9000}]})
    error = chat.json()["error"]
    assert (chat.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert served.workers.asked == []
