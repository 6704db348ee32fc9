"""Workers whose pages hold other numbers of tokens exchange none: they are told apart, and the text is the model's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model
from tests.unit.serve.in_process import LocalWorkers, Served
from tests.unit.serve.placed import GuidedServed, PlacedWorkers
from tests.unit.serve.test_host import MAX_TOKENS, collect, idle, request
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import EngineConfig, TransferConfig
from farspan.engine.engine import Engine
from farspan.errors import TransferError
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve.host import EngineHost
from farspan.serve.messages import Failed, Prefilled

BODY = {"model": "tiny", "prompt": TEXT[200:500], "max_tokens": 16, "logprobs": 2}
# Another prompt each: one that is found computed is done in one iteration, and nothing is offered before its end.
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 4, "n": 2, "prompt": TEXT[600:900]},
]


class MixedWorkers(LocalWorkers):
    """Pages of 4 tokens where prompts are computed, of 8 where answers are."""

    def config_of(self, role: str) -> EngineConfig:
        # Prompts take several iterations: pages are offered before the last of them.
        return replace(self.config, page_tokens=4 if role == "prefill" else 8, max_batch_tokens=32)


class MixedPlacedWorkers(MixedWorkers, PlacedWorkers):
    pass


class MixedServed(Served):
    make_workers = MixedWorkers


class MixedGuidedServed(GuidedServed):
    make_workers = MixedPlacedWorkers


@pytest.fixture(scope="module")
def mixed(tiny_folder: Path) -> Iterator[MixedServed]:
    made = MixedServed(tiny_folder)
    yield made
    made.stop()


def told(endpoint: Served, name: str, **how: Any) -> tuple[list[Any], dict[str, Any]]:
    """(choices, trace) of one request."""
    answer = endpoint.post("/v1/completions", {**BODY, **how}, headers={"x-request-id": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"], endpoint.get(f"/v1/requests/{name}/trace").json()


def assert_alike(found: list[Any], wanted: list[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
        logprobs = other["logprobs"]["token_logprobs"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(logprobs, rel=0, abs=1e-8)


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "seeded"])
def test_workers_of_different_page_sizes_that_are_paired_all_the_same_answer_like_those_of_one_size(mixed, served, how):
    wanted, fetched = told(served, "alike", **how)
    assert (fetched["recovered"], fetched["kv_bytes"] > 0) == (False, True)
    mixed.workers.followed.clear()
    found, trace = told(mixed, "mixed", **how)
    assert_alike(found, wanted)
    for one in (trace, *trace.get("other_choices", [])):
        assert (one["kv_pages"], one["kv_bytes"], one["transport"]) == (0, 0, "none")
        assert [reason for reason in one["recoveries"] if "another model or KV layout" in reason] == one["recoveries"]
        assert len(one["recoveries"]) == 1
    assert mixed.workers.followed
    assert not any(mixed.workers.followed)
    asyncio.run(mixed.settled())


def test_workers_of_different_page_sizes_are_not_ready(mixed):
    answer = mixed.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "mismatched")


def test_workers_of_different_page_sizes_are_never_paired_where_the_ingress_knows_them(tiny_folder, served):
    guided = MixedGuidedServed(tiny_folder, transfer=TransferConfig(split="always"))
    try:
        asyncio.run(guided.hear())
        found, trace = told(guided, "guided", temperature=0)
        assert_alike(found, told(served, "alike", temperature=0)[0])
        assert (trace["route"], trace["recovered"], trace["kv_bytes"]) == ("colocated", False, 0)
        asyncio.run(guided.settled())
    finally:
        guided.stop()


def test_a_ticket_of_more_pages_than_there_are_is_refused_at_once_when_their_size_is_another():
    (prompt,) = prompts(60)
    network, patient = MemoryNetwork(), TransferConfig(deadline_s=120.0)
    engines = [Engine(tiny_model(), engine_config(page_tokens=size)) for size in (1, 64)]
    room = 3 * engines[1].pool.layout.cost_bytes
    engines[1] = Engine(tiny_model(), engine_config(page_tokens=64, kv_bytes=room))
    prefill, decode = (
        EngineHost(role, engine, MemoryTransport(engine.pool, network), patient)
        for role, engine in zip(("prefill", "decode"), engines, strict=True)
    )

    async def run() -> None:
        one = request("r", prompt)
        prefilled = await prefill.prefill(one)
        assert isinstance(prefilled, Prefilled)
        assert prefilled.ticket is not None
        assert len(prefilled.ticket.pages) > engines[1].pool.num_pages
        _, (failed,) = await collect(decode.stream(one, (prefilled.token,), prefilled.ticket))
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, TransferError)
        assert "another model or KV layout" in str(failed.error)
        tokens, _ = await collect(decode.stream(one, (prefilled.token,), None))
        assert [prefilled.token, *tokens] == reference(tiny_model(), prompt, MAX_TOKENS)
        assert await prefill.release(prefilled.ticket.ticket_id)
        assert all([idle(await host.info()) for host in (prefill, decode)])

    for host in (prefill, decode):
        host.start()
    try:
        asyncio.run(run())
    finally:
        for host in (prefill, decode):
            host.stop()
