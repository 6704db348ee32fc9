"""A process of `farspan bench transfer`: an engine host over NIXL, asked through a pipe."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from farspan.config.schema import EngineConfig, TransferConfig
from farspan.engine.bench import EngineBench, bench_model
from farspan.engine.engine import Engine
from farspan.errors import FarspanError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.kv.transports.nixl import NixlTransport, adjacent_runs, make_agent
from farspan.serve.host import EngineHost
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, Tokens

# How often a bare read is looked at.
_LOOK_S = 2e-4


@dataclass(frozen=True, kw_only=True)
class TransferBench:
    """What is measured. The defaults are the model of the engine's bench."""

    settings: dict[str, int] = field(
        default_factory=lambda: {**EngineBench().settings, "max_position_embeddings": 16384}
    )
    dtype: str = "bfloat16"
    num_tokens: int = 8192
    turns: int = 3
    copies: int = 5
    """How often the pages of one prompt are moved for the speed."""
    threads: int = field(default_factory=torch.get_num_threads)
    max_batch_tokens: int = EngineConfig.max_batch_tokens
    kv_bytes: int = 512 << 20
    transport: str = "tcp"
    """What UCX may use."""
    deadline_s: float = 300.0
    """Longest time for one prompt."""


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt was computed, between two times of this machine's clock."""

    prefilled: Prefilled
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer after it ended; `pulled_at_s` is 0 where no pages were fetched."""

    tokens: tuple[int, ...]
    pulled_at_s: float = 0.0
    pulled: Pulled | None = None


def run_worker(role: str, pipe: Any, bench: TransferBench) -> None:
    """Answer what is asked until nobody asks any more."""
    os.environ["UCX_TLS"] = bench.transport
    torch.set_num_threads(bench.threads)
    asyncio.run(_Worker(role, pipe, bench).run())


class _Worker:
    def __init__(self, role: str, pipe: Any, bench: TransferBench) -> None:
        self._pipe = pipe
        model = bench_model(bench.settings, bench.dtype)
        if torch.cuda.is_available():
            model = model.to("cuda")
        settings = EngineConfig(dtype=bench.dtype, kv_bytes=bench.kv_bytes, max_batch_tokens=bench.max_batch_tokens)
        engine = Engine(model, settings)
        self._computed_s = 0.0
        step = engine.step

        def timed_step() -> Any:
            events = step()
            self._computed_s = time.monotonic()
            return events

        engine.step = timed_step  # type: ignore[method-assign]
        wait = TransferConfig(deadline_s=bench.deadline_s, lease_s=2 * bench.deadline_s)
        self._host = EngineHost(role, engine, NixlTransport(engine.pool), wait)
        self._device = engine.pool.device
        self._reader: _BareReader | None = None

    async def run(self) -> None:
        self._host.start()
        try:
            self._pipe.send("ready")
            while True:
                verb, *arguments = await asyncio.to_thread(self._pipe.recv)
                try:
                    said = await getattr(self, verb)(*arguments)
                except FarspanError as problem:
                    said = Failed(problem)
                if said is not None:
                    self._pipe.send(said)
        except EOFError:
            return
        finally:
            self._host.stop()

    async def prefill(self, request: GenerationRequest, tell: bool) -> Prompted | Failed:
        began = time.monotonic()
        async with aclosing(self._host.prefill_in_parts(request)) as items:
            async for item in items:
                if isinstance(item, Prefilled):
                    return Prompted(item, began, self._computed_s)
                if isinstance(item, Failed):
                    return item
                if tell:
                    self._pipe.send(item)
        raise AssertionError("the engine answers every request")

    async def release(self, ticket_id: str) -> None:
        await self._host.release(ticket_id)

    async def follow(self, offer: KvOffer) -> None:
        await self._host.follow(offer)

    async def answer(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> Answered | Failed:
        """All tokens of an answer."""
        return await self._answer(request, answered, ticket, only_pull=False)

    async def pull(self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket) -> Answered | Failed:
        """An answer that is given up when the pages are here."""
        return await self._answer(request, answered, ticket, only_pull=True)

    async def _answer(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None, *, only_pull: bool
    ) -> Answered | Failed:
        tokens, pulled, at_s = answered, None, 0.0
        async with aclosing(self._host.stream(request, answered, ticket)) as items:
            async for item in items:
                if isinstance(item, Failed):
                    return item
                if isinstance(item, Tokens):
                    tokens += item.tokens
                elif isinstance(item, Pulled):
                    pulled, at_s = item, time.monotonic()
                    if only_pull:
                        break
        return Answered(tokens, at_s, pulled)

    async def read(self, ticket: KvTicket) -> float:
        self._reader = self._reader or _BareReader(ticket.num_bytes, self._device)
        return self._reader.read(ticket)


class _BareReader:
    """NIXL without anything around it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory_B = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._agent = make_agent("bare")
        self._agent.register_memory([self._memory_B])
        self._kind, self._device = "VRAM" if device.type == "cuda" else "DRAM", device.index or 0
        self._peers: set[str] = set()

    def read(self, ticket: KvTicket) -> float:
        """Seconds of one read of all pages of a ticket, in as few pieces as they lie in."""
        source, size = ticket.source, ticket.page_bytes
        if source.incarnation not in self._peers:
            self._agent.add_remote_agent(source.metadata)
            self._peers.add(source.incarnation)
        runs = adjacent_runs([ref.page for ref in ticket.pages], list(range(len(ticket.pages))))
        here = [(self._memory_B.data_ptr() + at * size, count * size, self._device) for _, at, count in runs]
        there = [(source.pages_address + at * size, count * size, self._device) for at, _, count in runs]
        local, remote = (self._agent.get_xfer_descs(np.array(d, dtype=np.uint64), self._kind) for d in (here, there))
        handle = self._agent.initialize_xfer("READ", local, remote, source.incarnation)
        began = time.monotonic()
        status = self._agent.transfer(handle)
        while status == "PROC":
            # Who only looks takes a processor that the source may need.
            time.sleep(_LOOK_S)
            status = self._agent.check_xfer_state(handle)
        seconds = time.monotonic() - began
        assert status == "DONE", "the source is alive"
        handle.release()
        return seconds
