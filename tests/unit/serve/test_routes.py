"""Whatever goes wrong, the answer is an error in OpenAI's shape that says nothing of our insides."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest

from farspan.errors import ClusterError, RequestError
from farspan.serve.api import Api, _events
from farspan.serve.chat import Delta
from farspan.serve.messages import WorkerInfo
from farspan.serve.routes import route
from farspan.serve.wire import ApiError, CompletionRequest, Reply


def ask(problem: Exception, path: str = "/v1/models", method: str = "GET") -> httpx.Response:
    class Broken:
        async def models(self, request):
            raise problem

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(route(Broken))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (ValueError("sk-secret"), 500),
        (UnicodeEncodeError("utf-8", "sk-secret", 0, 1, "no"), 500),
        (ClusterError("sk-secret"), 500),
        (RequestError("r", "too long"), 400),
        (ApiError(404, "nothing"), 404),
    ],
)
def test_every_exception_is_an_error_in_openais_shape(problem, status):
    answer = ask(problem)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "sk-secret" not in answer.text
    assert "Traceback" not in answer.text


def test_the_traceback_of_an_exception_nobody_expected_is_in_the_log(caplog):
    with caplog.at_level(logging.ERROR):
        ask(ZeroDivisionError("by zero"))
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_an_address_that_is_not_there_is_told_in_the_same_shape(method, path, status):
    answer = ask(ValueError(), path, method)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]


def test_a_stream_that_breaks_ends_with_an_error_event_and_without_done():
    async def deltas():
        yield Delta("rest", None, 2)
        raise ZeroDivisionError("sk-secret")

    async def run() -> list[str]:
        return [event async for event in _events(Delta("a", None, 1), deltas(), Reply("r", "m", True), 3, True)]

    events = asyncio.run(run())
    codes = [json.loads(event.removeprefix("data: ")).get("error", {}).get("code") for event in events]
    assert codes == [None, None, "internal_error"]
    assert not any("sk-secret" in event for event in events)


def test_a_prompt_longer_than_the_model_takes_is_refused_before_it_travels():
    class Unasked:
        def __getattr__(self, name):
            raise AssertionError("a worker was asked")

    api = object.__new__(Api)
    api._router = Unasked()
    api._info = WorkerInfo("decode", 1, "layout", 97, 64, 4096, 1, 1, 0, 0, 0)
    asked = CompletionRequest(model="m", prompt="x")
    with pytest.raises(RequestError, match="has 64 tokens, the model takes at most 63"):
        asyncio.run(api._generate(None, asked, [1] * 64, 16, chat=False))


def test_a_long_prompt_is_tokenized_while_others_are_served():
    api = object.__new__(Api)
    api._model = "m"

    async def run() -> None:
        loop, ticked = asyncio.get_running_loop(), asyncio.Event()

        class Slow:
            def __call__(self, text):
                # Ends only when the event loop went on meanwhile.
                asyncio.run_coroutine_threadsafe(ticked.wait(), loop).result(timeout=30)
                return {"input_ids": [1, 2]}

        async def body(request, shape):
            return CompletionRequest(model="m", prompt="x")

        async def generate(request, asked, prompt, max_tokens, *, chat):
            return prompt

        api._tokenizer, api._authorize, api._body, api._generate = Slow(), lambda request: None, body, generate
        answer = asyncio.ensure_future(api.completions(None))
        await asyncio.sleep(0)
        ticked.set()
        assert await answer == [1, 2]

    asyncio.run(run())
