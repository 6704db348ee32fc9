"""Whoever asks whether the endpoint is ready hears it, and the workers hear of few of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from farspan.errors import ClusterError
from farspan.serve.readiness import Readiness


class Workers:
    """Answer when a test lets them."""

    def __init__(self) -> None:
        self.num_asked, self.now_s = 0, 0.0
        self.layouts: list[str] = ["a", "a"]
        self.transports = ["nixl", "nixl"]
        self.free = asyncio.Event()
        self.free.set()

    async def info(self) -> list[Any]:
        self.num_asked += 1
        await self.free.wait()
        if not self.layouts:
            raise ClusterError("a worker does not answer")
        told = enumerate(zip(self.layouts, self.transports, strict=False))
        return [SimpleNamespace(role=f"role{n}", layout=layout, transport=by) for n, (layout, by) in told]


def test_all_who_ask_at_once_share_one_question_also_when_some_leave():
    async def run() -> None:
        workers = Workers()
        workers.free.clear()
        readiness = Readiness(workers.info, lambda: workers.now_s)
        asking = [asyncio.ensure_future(readiness.told()) for _ in range(500)]
        await asyncio.sleep(0)
        for task in asking[:100]:
            task.cancel()
        await asyncio.sleep(0)
        workers.free.set()
        told = await asyncio.gather(*asking[100:])
        assert told == [(200, {"status": "ready", "roles": ["role0", "role1"]})] * 400
        assert workers.num_asked == 1

    asyncio.run(run())


def test_workers_with_different_transports_are_not_ready_and_one_sentence_says_why():
    async def run() -> None:
        workers = Workers()
        workers.transports = ["nixl", "object_store"]
        status, told = await Readiness(workers.info).told()
        assert (status, told["status"]) == (503, "mismatched")
        said = "KV pages cannot travel: a role0 worker nixl, a role1 worker object_store; set transfer.transport"
        assert told["reason"] == said

    asyncio.run(run())


@pytest.mark.parametrize("what", ["layouts", "transports"])
def test_one_worker_of_many_that_is_unlike_the_others_is_enough_not_to_be_ready(what):
    async def run() -> tuple[int, str]:
        workers = Workers()
        workers.layouts, workers.transports = ["a"] * 5, ["nixl"] * 5
        setattr(workers, what, [*getattr(workers, what)[:4], "other"])
        status, told = await Readiness(workers.info).told()
        return status, told["status"]

    assert asyncio.run(run()) == (503, "mismatched")


@pytest.mark.parametrize(("new", "status"), [(["prefill", "decode"], 200), (["decode"], 200), (["prefill"], 200)])
def test_while_a_new_checkpoint_takes_over_one_kind_that_has_all_roles_is_ready(new, status):
    workers = [("prefill", "old"), ("decode", "old"), *((role, "new") for role in new)]

    async def ask() -> list[Any]:
        return [SimpleNamespace(role=role, layout=layout, transport="nixl") for role, layout in workers]

    assert asyncio.run(Readiness(ask).told())[0] == status
    del workers[1]
    assert asyncio.run(Readiness(ask).told())[0] == (200 if set(new) == {"prefill", "decode"} else 503)


def test_without_a_worker_it_is_asleep_where_none_is_needed_whoever_asks_first_and_waiting_where_one_is():
    async def told(needed: int, *, silent: bool) -> tuple[int, str]:
        async def ask() -> list[Any]:
            if silent:
                raise ClusterError("a worker does not answer")
            return []

        status, told = await Readiness(ask, needed=needed).told()
        return status, told["status"]

    async def run() -> None:
        assert await told(0, silent=False) == (200, "asleep")
        assert await told(0, silent=True) == await told(1, silent=False) == (503, "waiting")

    asyncio.run(run())


def test_an_answer_is_kept_for_a_second_whatever_it_was():
    async def run() -> None:
        workers = Workers()
        readiness = Readiness(workers.info, lambda: workers.now_s)
        statuses = []
        for now_s, layouts in (
            (0.0, []),
            (0.9, ["a"]),
            (1.1, ["a", "a"]),
            (2.0, []),
            (2.2, ["a", "b"]),
            (9.0, ["b", "b"]),
        ):
            workers.now_s, workers.layouts = now_s, layouts
            statuses.append((await readiness.told())[0])
        assert statuses == [503, 503, 200, 200, 503, 200]
        assert workers.num_asked == 4

    asyncio.run(run())


def test_the_endpoint_asks_its_workers_once_for_many_questions(served, monkeypatch):
    asked = []
    info = served.workers.info

    async def counted():
        asked.append(1)
        return await info()

    monkeypatch.setattr(served.api._readiness, "_ask", counted)

    async def run() -> list[int]:
        async with served.http("none") as http:
            answers = await asyncio.gather(*(http.get("/ready") for _ in range(50)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [200] * 50
    assert len(asked) <= 2


def test_an_endpoint_without_workers_tells_its_models_and_tokens_and_asks_others_to_come_again(served, monkeypatch):
    there = served.post("/tokenize", {"prompt": "def f(x):"}).json()

    async def nobody() -> list[Any]:
        return []

    monkeypatch.setattr(served.workers, "info", nobody)
    monkeypatch.setattr(served.api, "_info", None)
    monkeypatch.setattr(served.api, "_readiness", Readiness(nobody, needed=0))
    assert served.get("/ready").json() == {"status": "asleep", "roles": []}
    models = served.get("/v1/models")
    assert (models.status_code, models.json()["data"][0]["id"]) == (200, "tiny")
    assert "max_model_len" not in models.json()["data"][0]
    assert there.pop("max_model_len") == 8192
    assert served.post("/tokenize", {"prompt": "def f(x):"}).json() == there
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
