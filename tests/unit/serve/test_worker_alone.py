"""A worker without Serve around it: what it is configured with is what it does."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.engine.request import SamplingParams
from farspan.kv.pages import PagePool
from farspan.kv.transports.choose import Chosen
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.serve import worker as module
from farspan.serve.messages import Bundle, GenerationRequest, Tokens
from farspan.serve.worker import DecodeWorker, Worker

NUM_TOKENS = 40


@pytest.mark.parametrize(("interval_s", "kept"), [(0.0, False), (1.0, True)])
def test_a_worker_keeps_tokens_for_as_long_as_its_config_says(tiny_folder, monkeypatch, interval_s, kept):
    monkeypatch.setattr(module, "replica_name", lambda: "alone")
    monkeypatch.setattr(module, "open_transport", in_memory)
    # Serve awaits it.
    monkeypatch.delattr(Worker, "__del__")
    # No iteration is far enough from the last message: what is kept, is kept by the clock alone.
    monkeypatch.setattr("farspan.serve.trunk._SPACING_S", 3600.0)
    config = ServeConfig(
        model=str(tiny_folder),
        engine=EngineConfig(dtype="float64", page_tokens=4, kv_bytes=1 << 20, threads=1),
        stream_interval_s=interval_s,
    )
    bundles = asyncio.run(told(DecodeWorker(config)))
    assert sum(len(item.tokens) for bundle in bundles for item in bundle) == NUM_TOKENS
    # Kept: what there is after a second, and at the end. Else as many messages as somebody took: each is a turn.
    most = max(len(bundle) for bundle in bundles)
    assert (most > NUM_TOKENS // 4) == kept


def in_memory(_: TransferConfig, pool: PagePool) -> Chosen:
    return Chosen(MemoryTransport(pool, MemoryNetwork()), "a test")


async def told(worker: DecodeWorker) -> list[list[Tokens]]:
    """What a trunk of the worker says, message by message, until an answer is over."""
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    request = GenerationRequest("r", tuple(range(1, 9)), params)
    bundles: list[list[Tokens]] = []
    try:
        async with asyncio.timeout(120), aclosing(worker.carry("alone", "t")) as carried:
            # It is open before the request comes.
            await anext(carried)
            asking = asyncio.ensure_future(_asked(worker, request))
            async for bundle in carried:
                if not isinstance(bundle, Bundle):
                    continue
                bundles.append([item for _, item in bundle.items if isinstance(item, Tokens)])
                if bundles[-1] and bundles[-1][-1].finish:
                    break
            await asking
    finally:
        worker._host.stop()
    return bundles


async def _asked(worker: DecodeWorker, request: GenerationRequest) -> None:
    async with aclosing(worker.resume(request, (), None, "t")) as items:
        async for _ in items:
            pass
