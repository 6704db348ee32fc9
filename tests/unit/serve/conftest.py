"""One tiny model folder, and one endpoint over it, for all tests of serving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.serve.in_process import Served
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.listener import Listener
from farspan.serve.port import free_port


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("api") / "tiny"
    write_tiny_model(made)
    return made


@pytest.fixture(scope="session")
def oracle(tiny_folder):
    """(model, tokenizer) as transformers loads them."""
    model = load_causal_lm(tiny_folder, torch.float64)
    model.set_attn_implementation("sdpa")
    return model, load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def shared(tiny_folder) -> Iterator[Served]:
    made = Served(tiny_folder)
    yield made
    made.stop()


@pytest.fixture
def served(shared) -> Served:
    """The endpoint of this module, nothing killed."""
    shared.workers.die_after, shared.workers.deaths = None, 0
    shared.workers.asked.clear()
    return shared


@pytest.fixture(scope="module")
def port(shared) -> Iterator[int]:
    """The endpoint of this module behind a real socket, as an ingress listens itself."""
    found = free_port()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listener = Listener(shared.app, "127.0.0.1", found, most_open=1000, head_timeout_s=60, drain_s=5)

    async def start() -> None:
        listener.start()

    asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=30)
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(listener.close(), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        assert not thread.is_alive()
        loop.close()
