"""An ingress' end of the streams that workers' trunks say (trunk.py)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import Context
from typing import Any

from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer
from farspan.serve.faults import LOST, being_cancelled
from farspan.serve.life import Watch, unless_silent
from farspan.serve.mailbox import Inbox, ends
from farspan.serve.messages import Alive, Elsewhere, Failed, Prefilled, StreamItem


class Line:
    """The answers of one worker."""

    def __init__(self, name: str, call: Any, watch: Watch) -> None:
        """`call`: the stream of a trunk."""
        self.name, self._call, self._watch = name, call, watch
        self._why = ""
        self._riders: dict[str, Inbox] = {}
        self._reading = asyncio.ensure_future(self._read())

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return bool(self._why)

    @contextmanager
    def rider(self, request_id: str) -> Iterator[Inbox]:
        """Where what comes for a request is put, for the time of the block; a loss of the worker in the end."""
        inbox = self._riders[request_id] = Inbox()
        if self.over:
            inbox.put(Failed(ClusterError(self._why)))
        try:
            yield inbox
        finally:
            del self._riders[request_id]

    async def _read(self) -> None:
        why, whole = f"the stream of {self._watch.whom} ended", False
        try:
            async with aclosing(unless_silent(self._call, self._watch)) as bundles:
                async for bundle in bundles:
                    for request_id, item in bundle.items:
                        # One that was given up is told of until its worker knows.
                        if (inbox := self._riders.get(request_id)) is not None:
                            inbox.put(item)
            whole = True
        except LOST as problem:
            why, whole = f"{self._watch.whom} was lost: {type(problem).__name__}", True
        except ClusterError as problem:
            why = str(problem)
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            why = f"the call of {self._watch.whom} was given up"
        finally:
            self._why = why
            if not whole:
                self._call.cancel()
            for inbox in self._riders.values():
                inbox.put(Failed(ClusterError(why)))


class Lines:
    """The lines of an ingress, by worker."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}

    def of(self, worker: str, call: Callable[[str], Any], watch: Watch) -> Line:
        """The line of a worker. Where there is none, `call` begins one, by a name that nothing else has."""
        line = self._lines.get(worker)
        if line is None or line.over:
            name = uuid.uuid4().hex
            self._lines = {other: line for other, line in self._lines.items() if not line.over}
            # In a context of its own: what is begun by a request that is cancelled would be cancelled with it.
            line = self._lines[worker] = Context().run(lambda: Line(name, call(name), watch))
        return line


async def followed(call: AsyncGenerator[StreamItem | Elsewhere], inbox: Inbox) -> AsyncGenerator[StreamItem]:
    """What a request's own call says and, once it says so, what comes by the line."""
    async with aclosing(call):
        async for item in call:
            if isinstance(item, Elsewhere):
                break
            yield item
        else:
            return
        ending = asyncio.ensure_future(_last(call, inbox))
        try:
            over = False
            while not over:
                told = await inbox.take()
                assert not isinstance(told, Prefilled | KvOffer | Alive)
                over = ends(told)
                yield told
        finally:
            ending.cancel()
            await asyncio.wait((ending,))


async def _last(call: AsyncGenerator[StreamItem | Elsewhere], inbox: Inbox) -> None:
    # Nothing but a loss comes by the call any more.
    async for item in call:
        assert isinstance(item, Failed)
        inbox.put(item)
