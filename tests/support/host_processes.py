"""Processes of one host for tests of its cache: an agent, and workers that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from tests.support.forking import forking
from tests.unit.engine.tiny import engine_config, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.kv.host_agent import HostAgent
from farspan.kv.host_cache import HostCache, Source
from farspan.kv.host_client import join_host_cache
from farspan.kv.host_index import Block

WAIT_S = 60.0


@contextmanager
def started(work: Any, *args: Any) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """A process that runs `work(pipe, *args)`, and our end of the pipe; killed at the end of the block."""
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(WAIT_S)
        process.close()
        ours.close()


def told(pipe: Connection) -> Any:
    """The next thing a process says."""
    assert pipe.poll(WAIT_S), "the process says nothing"
    return pipe.recv()


def agent(pipe: Connection, capacity_bytes: int, slot_bytes: int) -> None:
    made = HostAgent(capacity_bytes, slot_bytes)
    pipe.send(made.address)
    made.run(linger_s=WAIT_S)


def host_engine(addresses: list[str], timeout_s: float = 30.0, **settings: object) -> Engine:
    """An engine on a tiny model whose pages go on in the memory of the agent at the last of `addresses`."""
    return Engine(
        tiny_model(),
        engine_config(host_cache_bytes=1, **settings),
        host_cache=lambda layout: join_host_cache(addresses[-1], layout.page_bytes, timeout_s),
    )


def ask(engine: Engine, prompt: list[int], num_tokens: int = 8) -> tuple[list[int], list[float], int]:
    """(tokens, log-probabilities, prompt tokens found) of one request, once everything is kept."""
    assert engine.host is not None
    engine.add("r", prompt, SamplingParams(max_tokens=num_tokens, logprobs=1))
    events: list[Any] = []
    while engine.has_work:
        events += engine.step()
    assert engine.host.flush(WAIT_S)
    engine.check_integrity()
    return [e.token for e in events], [e.logprobs.logprob for e in events], events[0].num_found


def worker(pipe: Connection, address: str, prompt: list[int]) -> None:
    """Answers one prompt, says what it answered, and then does nothing until it is killed."""
    torch.set_num_threads(1)
    pipe.send(ask(host_engine([address]), prompt))
    pipe.recv()


def dying_writer(pipe: Connection, address: str, names: list[bytes], block_bytes: int) -> None:
    """Stops with half of every block written."""

    class Halfway(HostCache):
        def _copy(self, grants, contents, *, back):
            for grant, content_B in zip(grants, contents, strict=True):
                half = len(content_B) // 2
                self._tier._memory_SB[grant.slot, :half] = content_B[:half]
            pipe.send(len(grants))
            pipe.recv()

    joined = join_host_cache(address, block_bytes)
    cache = Halfway(joined._arbiter, joined._tier)
    content_B = torch.full((block_bytes,), 7, dtype=torch.uint8)
    cache.store([source(name, content_B) for name in names])


def source(name: bytes, content_B: torch.Tensor) -> Source:
    return Source(Block(name, b"\0" * 32), content_B, lambda: True)
