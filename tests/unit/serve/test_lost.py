"""Workers that are lost: an answer goes on as long as it gets on, and where nobody is left clients may come again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tests.support.double import DoublePrecision
from tests.unit.engine.adapted import assert_greedy
from tests.unit.serve.in_process import LocalWorkers, Served
from tests.unit.serve.tiny_folder import TEXT

from farspan.errors import ClusterError, EngineError, FarspanError, ModelError, RequestError, TransferError
from farspan.serve.faults import as_api_error
from farspan.serve.messages import Failed

PROMPT = TEXT[200:500]
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}


class LosingWorkers(LocalWorkers):
    """Whoever answers is lost after three more tokens, `losses` times; with `nobody`, from then on all are."""

    losses, nobody = 0, False

    async def prefill(self, request: Any) -> Any:
        if self.nobody and self.deaths >= self.losses:
            return Failed(ClusterError("no prefill worker was free within 3 s"))
        return await super().prefill(request)

    async def resume(self, request: Any, answered: tuple[int, ...], ticket: Any) -> Any:
        over = self.deaths >= self.losses
        if over and self.nobody:
            yield Failed(EngineError("the decode worker stopped: shutting down"))
            return
        self.die_after = None if over else len(answered) + 3
        async with aclosing(super().resume(request, answered, ticket)) as items:
            async for item in items:
                yield item


class LosingServed(Served):
    make_workers = LosingWorkers


@pytest.fixture(scope="module")
def endpoint(tiny_folder: Path) -> Iterator[LosingServed]:
    made = LosingServed(tiny_folder)
    yield made
    made.stop()


@pytest.fixture
def losing(endpoint: LosingServed) -> LosingServed:
    """The endpoint, nobody lost yet."""
    endpoint.workers.deaths, endpoint.workers.losses, endpoint.workers.nobody = 0, 0, False
    return endpoint


def streamed(losing: LosingServed, name: str) -> list[dict[str, Any]]:
    """The events of a stream but [DONE], which is checked."""
    body = {**BODY, "stream": True, "return_token_ids": True}
    answer = losing.post("/v1/completions", body, headers={"x-request-id": name})
    assert answer.status_code == 200, answer.text
    events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
    found = [json.loads(event) for event in events if event != "[DONE]"]
    assert (events[-1] == "[DONE]") == ("error" not in found[-1])
    return found


def test_a_stream_whose_worker_is_lost_four_times_has_exactly_the_tokens_of_the_model(losing, oracle):
    losing.workers.losses = 4
    events = streamed(losing, "four")
    tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert len(tokens) == BODY["max_tokens"]
    model, tokenizer = oracle
    with DoublePrecision():
        assert_greedy(model, tokenizer(PROMPT)["input_ids"], tokens)
    trace = losing.get("/v1/requests/four/trace").json()
    assert [("worker was lost" in why) for why in trace["recoveries"]] == [True] * 4
    asyncio.run(losing.settled())


@pytest.mark.parametrize("stream", [False, True])
def test_where_no_worker_is_left_a_client_is_told_when_to_come_again(losing, stream):
    losing.workers.nobody = True
    answer = losing.post("/v1/completions", {**BODY, "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")


def test_a_stream_that_nobody_is_left_to_go_on_with_ends_with_that_error_and_without_done(losing):
    losing.workers.losses, losing.workers.nobody = 1, True
    *given, last = streamed(losing, "broken")
    assert sum(len(event["choices"][0]["token_ids"]) for event in given) == 4
    assert last["error"]["code"] == "unavailable"
    asyncio.run(losing.settled())


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (ClusterError("the decode worker was lost: ActorDiedError"), 503),
        (EngineError("the decode worker stopped: shutting down"), 503),
        (RequestError("r", "the prompt is empty"), 400),
        (TransferError("r", "the source broke"), 500),
        (ModelError("a model nobody can run"), 500),
    ],
)
def test_only_capacity_that_was_lost_is_worth_asking_again_for(problem: FarspanError, status: int):
    told = as_api_error(problem)
    assert told.status == status
    assert ("retry-after" in told.headers) == (status == 503)
