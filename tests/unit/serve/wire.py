"""Deployments as a router sees them, over engines of this process whose processes may freeze and whose calls break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorUnavailableError

from farspan.serve.host import EngineHost
from farspan.serve.load import Identity
from farspan.serve.messages import Alive, Bundle
from farspan.serve.trunk import Trunks

_PATIENCE_S = 0.1

Fault = Callable[["Replica"], None]


class Replica:
    """One worker. While it is frozen it says nothing; what it is told then reaches it when it wakes."""

    def __init__(
        self, name: str, deployment: str, host: EngineHost, pulse_s: float = 0.05, longest_s: float = 0.0
    ) -> None:
        self.name, self.deployment, self.host = name, deployment, host
        self.trunks = Trunks(pulse_s, longest_s)
        self.awake = asyncio.Event()
        self.awake.set()
        self.calls: list[Call] = []
        self.faults: dict[int, Fault] = {}
        """What happens before it says its item of that number."""
        self._said = 0

    def says(self) -> None:
        if (fault := self.faults.pop(self._said, None)) is not None:
            fault(self)
        self._said += 1

    def reset(self) -> None:
        """Every call of it breaks off; it does not know."""
        for call in self.calls:
            call.break_off()

    async def resumed(self, request: Any, answered: Any, ticket: Any, trunk: str) -> AsyncGenerator[Any]:
        """As `Worker.resume`."""
        with self.trunks.rider(trunk) as ridden:
            async with aclosing(self.host.stream(request, answered, ticket, ridden)) as items:
                async for item in items:
                    yield item

    async def ask(self, method: str, *arguments: Any) -> Any:
        await self.awake.wait()
        if method == "report":
            return await self.host.report(Identity(self.name, self.deployment, "1", "k"), None, -1)
        if method == "follow":
            return await self.host.follow(arguments[1]) if arguments[0] == self.name else None
        return await getattr(self.host, method)(*arguments)


class Call:
    """A call that streams: the worker goes on whether anybody listens or not, until it is told to stop."""

    def __init__(self, replica: Replica, items: AsyncGenerator[Any]) -> None:
        self._replica, self._broken = replica, False
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self._working = asyncio.ensure_future(self._work(items))
        self._errand: asyncio.Future[None] | None = None
        self.num_bundles = 0
        replica.calls.append(self)

    @property
    def carries(self) -> bool:
        """Whether it is one for many answers."""
        return self.num_bundles > 0

    def cancel(self) -> None:
        # Over a connection that broke nothing is told.
        if not self._broken:
            self._errand = asyncio.ensure_future(self._stop())

    def break_off(self) -> None:
        self._broken = True

    async def _work(self, items: AsyncGenerator[Any]) -> None:
        async with aclosing(items):
            async for item in items:
                self._said.put_nowait(item)
        self._said.put_nowait(None)

    async def _stop(self) -> None:
        await self._replica.awake.wait()
        self._working.cancel()

    async def __aiter__(self) -> AsyncIterator[Any]:
        replica = self._replica
        await replica.awake.wait()
        yield Alive()
        while (item := await self._said.get()) is not None:
            replica.says()
            await replica.awake.wait()
            if self._broken:
                raise ActorUnavailableError("the connection was reset", None)
            self.num_bundles += isinstance(item, Bundle)
            yield item


class Deployment:
    """A handle. A call that names nobody goes to the first that is awake."""

    def __init__(self, *replicas: Replica, named: str = "") -> None:
        self.replicas, self._named = replicas, named

    def options(self, session_id: str | None = None, **_: Any) -> Deployment:
        return Deployment(*self.replicas, named=self._named if session_id is None else session_id)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *arguments: self._call(self._replica, method, *arguments),
            choose_replica=lambda *_: self._chosen(method),
        )

    @asynccontextmanager
    async def _chosen(self, method: str) -> AsyncIterator[Any]:
        replica = self._replica
        await replica.awake.wait()
        yield SimpleNamespace(replica_id=replica.name, replica=replica, method=method)

    def dispatch(self, chosen: Any, *arguments: Any) -> Any:
        return self._call(chosen.replica, chosen.method, *arguments)

    def broadcast(self, method: str, *arguments: Any) -> Any:
        asked = [asyncio.ensure_future(replica.ask(method, *arguments)) for replica in self.replicas]

        async def results(timeout_s: float | None = None, **_: Any) -> list[Any]:
            # Not cancelled with whoever waits for them: they were sent.
            patience_s = None if timeout_s is None else min(timeout_s, _PATIENCE_S)
            return list(await asyncio.wait_for(asyncio.shield(asyncio.gather(*asked)), patience_s))

        return SimpleNamespace(results_async=results)

    @property
    def _replica(self) -> Replica:
        named = [replica for replica in self.replicas if replica.name == self._named]
        return next(iter(named or [replica for replica in self.replicas if replica.awake.is_set()]), self.replicas[0])

    def _call(self, replica: Replica, method: str, *arguments: Any) -> Any:
        if method == "resume":
            return Call(replica, replica.resumed(*arguments))
        if method == "carry":
            name, trunk = arguments
            assert replica.name == name, "every worker of this world is there, frozen or not"
            return Call(replica, replica.trunks.opened(trunk))
        if method == "prefill_in_parts":
            return Call(replica, replica.host.prefill_in_parts(*arguments))
        return replica.ask(method, *arguments)
