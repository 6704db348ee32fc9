"""How a request gets to workers: chosen by a guide that hears from them, or by its length alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from farspan.config.schema import ServeConfig
from farspan.serve.along import Along, PlacedWorkers
from farspan.serve.autoscale import Objectives
from farspan.serve.faults import is_past, too_late, unavailable
from farspan.serve.guide import Guide
from farspan.serve.load import WorkerLoad
from farspan.serve.messages import GenerationRequest
from farspan.serve.policy import Route, Rules
from farspan.serve.quotas import Orders
from farspan.serve.router import Workers

# How often workers are asked how they stand.
_HEAR_S = 0.5
# Longest wait of a request for the answers of all workers, where an ingress has just begun to ask.
_FIRST_ROUND_S = 5.0


class Ways(Protocol):
    """Where requests go."""

    @property
    def asleep(self) -> bool:
        """No worker is known, or not yet who there is: `ready` must be waited for first."""
        ...

    async def ready(self, deadline_at_s: float | None) -> None:
        """Wait until there is a worker. Raises ApiError when none comes in time."""
        ...

    async def met(self, workers: Iterable[str]) -> None:
        """Wait until these were heard of, or had their time to say how they stand."""
        ...

    def way(self, request: GenerationRequest) -> Route: ...

    def workers(self, request: GenerationRequest, route: Route) -> Workers:
        """Those of a way that is taken from now on."""
        ...


class LengthWays:
    """For workers nobody can tell apart: long prompts are computed apart."""

    def __init__(self, workers: Workers, config: ServeConfig) -> None:
        self._workers, self._config, self.asleep = workers, config, False

    async def ready(self, deadline_at_s: float | None) -> None:
        return None

    async def met(self, workers: Iterable[str]) -> None:
        return None

    def way(self, request: GenerationRequest) -> Route:
        least = self._config.transfer.colocate_below_tokens
        if len(request.prompt) < least:
            return Route(False, f"{len(request.prompt)} prompt tokens, fewer than {least}")
        return Route(True, "prompt is worth a prefill worker")

    def workers(self, request: GenerationRequest, route: Route) -> Workers:
        return self._workers


class HeardWorkers(PlacedWorkers, Protocol):
    """Workers that say how they stand."""

    async def reports(self, orders: Mapping[str, Orders], hear: Callable[[WorkerLoad, float], None]) -> set[str]:
        """`hear` is told of each answer when it comes, and when it was asked for. Those that are known to be gone."""
        ...

    async def wake(self, timeout_s: float) -> list[WorkerLoad]: ...


class GuidedWays:
    """Chosen by what every worker has to do, has cached, and is predicted to take."""

    def __init__(self, workers: HeardWorkers, config: ServeConfig) -> None:
        aims, transfer = config.objectives, config.transfer
        rules = Rules(transfer.colocate_below_tokens, transfer.split == "always")
        self.guide = Guide(rules, Objectives(aims.first_token_s, aims.token_s))
        self._workers, self._start_timeout_s = workers, config.start_timeout_s
        self._hearing: asyncio.Task[None] | None = None
        self._all_asked = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None

    @property
    def asleep(self) -> bool:
        # Before all had their time to answer, only the quickest is known, and would be given whatever comes.
        return not self.guide.workers or (self._hearing is not None and not self._all_asked.is_set())

    async def ready(self, deadline_at_s: float | None) -> None:
        self.listen()
        left_s = self._start_timeout_s if deadline_at_s is None else deadline_at_s - time.time()
        left_s = max(0.0, min(self._start_timeout_s, left_s))
        ends_s = time.monotonic() + left_s
        with suppress(TimeoutError):
            # Half of what is left: who is known then will do.
            await asyncio.wait_for(self._all_asked.wait(), min(_FIRST_ROUND_S, left_s / 2))
        if self.guide.workers:
            return
        for load in await self._workers.wake(max(0.0, ends_s - time.monotonic())):
            # As of now: it answered when it had come, however long ago it was called for.
            self.guide.heard(load, time.monotonic())
        if self.guide.workers:
            # The one that came is known, and not yet who came with it.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked(), min(_FIRST_ROUND_S, max(0.0, ends_s - time.monotonic()) / 2))
            return
        if is_past(deadline_at_s):
            raise too_late()
        raise unavailable("no worker could be started in time")

    async def met(self, workers: Iterable[str]) -> None:
        if unknown := set(workers) - {load.worker for load in self.guide.workers}:
            await self._ask_all(unknown)

    def way(self, request: GenerationRequest) -> Route:
        return self.guide.route(request)

    def workers(self, request: GenerationRequest, route: Route) -> Workers:
        self.guide.arrived(route, len(request.prompt))
        return Along(self._workers, self.guide, route)

    def listen(self) -> None:
        """Hear from the workers from now on."""
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.ensure_future(self._hear())

    async def _hear(self) -> None:
        while True:
            asked_at_s = time.monotonic()
            try:
                await self._asked()
            finally:
                self._all_asked.set()
            await asyncio.sleep(max(0.0, _HEAR_S - (time.monotonic() - asked_at_s)))

    async def _asked(self) -> None:
        """Wait for a round of questions: the one under way, if there is one."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask_all())
        # Others wait for it too: it goes on when one of them leaves.
        await asyncio.shield(self._asking)

    async def _ask_all(self, more: Iterable[str] = ()) -> None:
        """`more`: workers that were never heard of, and are to be asked by name where one of them all is silent."""
        orders = {**dict.fromkeys(more, Orders()), **self.guide.orders()}
        for worker in await self._workers.reports(orders, self.guide.heard):
            self.guide.gone(worker)
