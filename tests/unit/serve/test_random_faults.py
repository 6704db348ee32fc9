"""Workers freeze, wake and lose their connections at random: every answer is transformers', and nothing stays held."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
from tests.unit.engine.tiny import engine_config, prompts, reference, tiny_model
from tests.unit.serve.wire import Deployment, Fault, Replica

from farspan.config.schema import ServeConfig, TransferConfig
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve.chat import answer_tokens
from farspan.serve.host import EngineHost
from farspan.serve.messages import GenerationRequest
from farspan.serve.router import Router
from farspan.serve.trace import RequestTrace
from farspan.serve.ways import GuidedWays

SILENT_S, PULSE_S, LEASE_S = 1.0, 0.05, 5.0
MAX_TOKENS = 24
TRANSFER = TransferConfig(deadline_s=3.0, lease_s=LEASE_S, split="always")
NAMES = {"p": "prefill", "d": "decode", "e": "decode"}
ASKED = prompts(40, 17, 90, 60, 33)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[EngineHost]]:
    network = MemoryNetwork()
    engines = [Engine(tiny_model(), engine_config(max_batch_tokens=16)) for _ in NAMES]
    made = [
        EngineHost(role, engine, MemoryTransport(engine.pool, network), TRANSFER, PULSE_S)
        for role, engine in zip(NAMES.values(), engines, strict=True)
    ]
    for host in made:
        host.start()
    yield made
    for host in made:
        host.stop()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [reference(tiny_model(), prompt, MAX_TOKENS) for prompt in ASKED]


def freeze(replica: Replica) -> None:
    replica.awake.clear()


def pause(replica: Replica) -> None:
    replica.awake.clear()
    asyncio.get_running_loop().call_later(SILENT_S / 4, replica.awake.set)


def draw(seed: int) -> dict[str, dict[int, Fault]]:
    """One worker freezes for ever, every other one pauses or loses its connections."""
    choose = random.Random(seed)
    frozen = choose.choice(list(NAMES))
    kinds = {name: freeze if name == frozen else choose.choice([pause, Replica.reset]) for name in NAMES}
    return {name: {choose.randrange(4): kind} for name, kind in kinds.items()}


async def hear(ways: GuidedWays, router: Router) -> None:
    """One round does not wait for the one before, which waits for somebody frozen: this world is faster than ours."""
    async with asyncio.TaskGroup() as rounds:
        while True:
            rounds.create_task(router.reports(ways.guide.orders(), ways.guide.heard))
            await asyncio.sleep(SILENT_S / 10)


async def told(ways: GuidedWays, name: str, prompt: list[int], traces: list[RequestTrace]) -> list[int]:
    request = GenerationRequest(name, tuple(prompt), SamplingParams(max_tokens=MAX_TOKENS))
    route = ways.way(request)
    traces.append(RequestTrace(name, len(prompt)))
    batches = answer_tokens(request, route, ways.workers(request, route), traces[-1])
    return [token async for batch in batches for token in batch.tokens]


async def settled(hosts: list[EngineHost]) -> None:
    ends_s = time.monotonic() + 30
    while not all(
        info.num_free == info.num_pages and not (info.num_requests or info.open_leases)
        for info in [await host.info() for host in hosts]
    ):
        assert time.monotonic() < ends_s, "pages stay held"
        await asyncio.sleep(0.01)
    for host in hosts:
        await host.check_integrity()


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_exact_and_nothing_stays_held_whatever_workers_do(hosts, expected, seed):
    async def run() -> None:
        # Odd ones keep tokens for each other, and lose them.
        kept_s = 0.02 * (seed % 2)
        named = zip(NAMES.items(), hosts, strict=True)
        replicas = [Replica(name, role, host, longest_s=kept_s) for (name, role), host in named]
        router = Router(Deployment(replicas[0]), Deployment(*replicas[1:]), SILENT_S)
        ways = GuidedWays(router, ServeConfig(model="m", transfer=TRANSFER))
        await router.reports({}, ways.guide.heard)
        hearing = asyncio.ensure_future(hear(ways, router))
        for replica in replicas:
            replica.faults = draw(seed)[replica.name]
        traces: list[RequestTrace] = []
        async with asyncio.timeout(60):
            asking = (told(ways, f"{seed}-{n}", prompt, traces) for n, prompt in enumerate(ASKED))
            answers = await asyncio.gather(*asking)
        assert answers == expected
        # Unless nobody asked whoever was to freeze.
        assert any(trace.recovered for trace in traces) or all(replica.awake.is_set() for replica in replicas)
        hearing.cancel()
        for replica in replicas:
            replica.awake.set()
        await settled(hosts)

    asyncio.run(run())


def test_beside_a_frozen_worker_the_others_are_met_though_nobody_heard_of_them_before(hosts, monkeypatch):
    monkeypatch.setattr("farspan.serve.router._REPORT_TIMEOUT_S", 0.5)

    async def run() -> None:
        p, d, e = (Replica(name, role, host) for (name, role), host in zip(NAMES.items(), hosts, strict=True))
        freeze(e)
        ways = GuidedWays(Router(Deployment(p), Deployment(d, e), SILENT_S), ServeConfig(model="m", transfer=TRANSFER))
        async with asyncio.timeout(30):
            await ways.met("pd")
        assert {load.worker for load in ways.guide.workers} == {"p", "d"}
        e.awake.set()

    asyncio.run(run())
