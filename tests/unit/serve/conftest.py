"""One tiny model folder, and one endpoint over it, for all tests of serving."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from tests.unit.serve.in_process import Served
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.models.checkpoint import load_causal_lm, load_tokenizer


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
    """The endpoint of this module behind a real socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(shared.app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listening]),))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
