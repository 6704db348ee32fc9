"""Workers in this process that are named, as replicas of Ray Serve are: each can do everything, and can be lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from tests.unit.serve.in_process import LocalWorkers, Served

from farspan.config.schema import ServeConfig
from farspan.errors import ClusterError, FarspanError
from farspan.kv.ticket import KvTicket
from farspan.serve.load import Identity, WorkerLoad
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, StreamItem, Tokens, WorkerInfo
from farspan.serve.policy import Place
from farspan.serve.quotas import Orders
from farspan.serve.ways import GuidedWays

NAMES = ("p", "d", "e")


class PlacedWorkers(LocalWorkers):
    """`p` is of the deployment for prompts, `d` and `e` of that for answers. Nobody in particular: `p` or `d`."""

    def __init__(self, folder: Path, **engine: Any) -> None:
        super().__init__(folder, **engine)
        self.gone: set[str] = set()
        self.die_in: int | None = None
        """Whoever gives so many tokens is lost, once."""
        self.dies_of: FarspanError = ClusterError("the decode worker was lost: ActorDiedError")
        self.resumed: list[tuple[str | None, int]] = []
        """(who was asked for, tokens given before) of every stream."""
        self.fetched: list[bool] = []
        """Whether each had a ticket."""
        self.quotas: dict[str, Orders] = {}

    async def prefill(
        self, request: GenerationRequest, place: Place | None = None, answering: Place | None = None
    ) -> Prefilled | Failed:
        name = "p" if place is None else place.worker
        if name in self.gone:
            return Failed(ClusterError("the prefill worker was lost: ActorDiedError"))
        return await self._host(name).prefill(request)

    async def resume(
        self,
        request: GenerationRequest,
        answered: tuple[int, ...],
        ticket: KvTicket | None,
        place: Place | None = None,
    ) -> AsyncGenerator[StreamItem]:
        name = "d" if place is None else place.worker
        self.resumed.append((place and name, len(answered)))
        self.fetched.append(ticket is not None)
        stream = self._host(name).stream(request, answered, ticket)
        try:
            async for item in stream:
                if self.die_in is not None and isinstance(item, Tokens):
                    self.die_in -= len(item.tokens)
                    if self.die_in <= 0:
                        self.gone.add(name)
                        self.die_in = None
                        yield Failed(self.dies_of)
                        return
                yield item
        finally:
            await stream.aclose()

    def release(self, ticket_id: str, place: Place | None = None) -> None:
        self._errand(self._host("p" if place is None else place.worker).release(ticket_id))

    async def reports(self, orders: Mapping[str, Orders], hear: Callable[[WorkerLoad, float], None]) -> set[str]:
        self.quotas.update(orders)
        for name in (name for name in NAMES if name not in self.gone):
            asked_at_s = time.monotonic()
            hear(await self.report(name, orders.get(name, Orders())), asked_at_s)
        return self.gone & orders.keys()

    async def wake(self, timeout_s: float) -> list[WorkerLoad]:
        return [await self.report("d", Orders())]

    async def info(self) -> list[WorkerInfo]:
        infos = await super().info()
        return [replace(info, worker=name) for info, name in zip(infos, NAMES, strict=True)]

    async def report(self, name: str, orders: Orders) -> WorkerLoad:
        identity = Identity(name, "prefill" if name == "p" else "decode", "1", "k")
        return await self._host(name).report(identity, orders.quota, orders.known_prefixes)

    def _host(self, name: str) -> Any:
        return self.hosts[NAMES.index(name)]


class GuidedServed(Served):
    """An endpoint that chooses among named workers."""

    make_workers = PlacedWorkers

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.renew(self.config)

    def renew(self, config: ServeConfig) -> None:
        """Forget what was learned."""
        self.ways = GuidedWays(self.workers, config)
        self.api._ways, self.api._config = self.ways, config

    def post(self, path: str, body: Any, key: str = "sk-one", **more: Any) -> httpx.Response:
        # What is told twice a second otherwise.
        asyncio.run(self.hear())
        return super().post(path, body, key, **more)

    async def hear(self) -> None:
        await self.workers.reports(self.ways.guide.orders(), self.ways.guide.heard)
