"""Whatever goes wrong, the answer is an error in OpenAI's shape that says nothing of our insides."""

from __future__ import annotations

import asyncio
import logging

import httpx
import openai
import pytest
from fastapi.responses import JSONResponse

from farspan.errors import ClusterError, ModelError, RequestError
from farspan.serve.routes import route
from farspan.serve.shape import ApiError


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
        (ModelError("sk-secret"), 500),
        (ClusterError("sk-secret"), 503),
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


def test_a_name_with_slashes_is_asked_for_as_it_is_written_or_escaped():
    asked = []

    class Told:
        async def models(self, request):
            return JSONResponse("all")

        async def model(self, request, name):
            asked.append(name)
            return JSONResponse(name)

    async def run(*paths: str) -> list[str]:
        transport = httpx.ASGITransport(route(Told))
        async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as http:
            found = [(await http.get(path)).json() for path in paths]
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http)
            await client.models.retrieve("org/tiny:law")
            return found

    paths = ("/models/", "/models/a", "/models/org/a", "/models/org%2Fa", "/models/a/trace", "/models/a%20b")
    assert asyncio.run(run(*paths)) == ["all", "a", "org/a", "org/a", "a/trace", "a b"]
    assert asked[-1] == "org/tiny:law"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_an_address_that_is_not_there_is_told_in_the_same_shape(method, path, status):
    answer = ask(ValueError(), path, method)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]
