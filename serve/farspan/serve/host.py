"""An engine in a thread of its own, and the bridge to asyncio.

Everything that touches pages (engine, leases, transfers) happens in that one thread. Callers leave commands in a
queue and get items through the event loop they called from.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

from farspan.config.schema import TransferConfig
from farspan.engine.engine import Engine
from farspan.errors import EngineError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.kv.transports.base import Transport
from farspan.serve.engine_loop import Client, EngineLoop
from farspan.serve.load import Identity, WorkerLoad
from farspan.serve.mailbox import Command, Inbox, Mailbox, ends, tell
from farspan.serve.messages import (
    Alive,
    Elsewhere,
    Failed,
    GenerationRequest,
    Prefilled,
    PrefillItem,
    StreamItem,
    Tokens,
    WorkerInfo,
)
from farspan.serve.quotas import Quota
from farspan.serve.trunk import Trunk

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

_DRAIN_POLL_S = 0.05


class EngineHost:
    """One worker's engine. `start` before use, `stop` at the end."""

    def __init__(
        self, role: str, engine: Engine, transport: Transport, config: TransferConfig, pulse_s: float | None = None
    ) -> None:
        """`pulse_s`: how long a stream says nothing before it says that it is `Alive`; none: it never does."""
        self._role, self._engine, self._transport, self._pulse_s = role, engine, transport, pulse_s
        self._loop, self._commands = EngineLoop(role, engine, transport, config), Mailbox()
        self._dead: str = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine-{role}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whoever still waits is told."""
        self._stopping.set()
        with suppress(EngineError):
            self._commands.put(Command(lambda: None))
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self._commands.close(self._ended())
        self._engine.close()
        self._transport.close()

    def check(self) -> None:
        """Raises EngineError when the engine thread has ended."""
        if self._dead or not self._thread.is_alive():
            raise EngineError(f"the engine thread of the {self._role} worker ended: {self._dead or 'stopped'}")

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        """Compute a prompt and its first token, and hold its pages for whoever gets the ticket."""
        async for item in self._serve(request, prefill_only=True):
            assert isinstance(item, Prefilled | Failed | Alive)
            if not isinstance(item, Alive):
                return item
        raise AssertionError("the engine answers every request")

    async def prefill_in_parts(self, request: GenerationRequest) -> AsyncGenerator[PrefillItem | Alive]:
        """`prefill`, with an offer of its full pages after each part of a prompt that takes several."""
        async with aclosing(self._serve(request, prefill_only=True, in_parts=True)) as items:
            async for item in items:
                assert isinstance(item, KvOffer | Prefilled | Failed | Alive)
                yield item

    async def follow(self, offer: KvOffer) -> bool:
        """Fetch pages of a prompt that is still computed elsewhere, before its ticket comes with `stream`.

        False: they are not wanted now, and nothing is held for them.
        """
        return await self._call(lambda: self._loop.follow(offer))

    async def stream(
        self,
        request: GenerationRequest,
        answered: tuple[int, ...],
        ticket: KvTicket | None,
        trunk: Trunk | None = None,
    ) -> AsyncGenerator[StreamItem | Alive | Elsewhere]:
        """The tokens after `answered`. With a ticket, the prompt's pages are fetched instead of computed.

        They go by the trunk if it is open when the first of them are there.
        """
        async for item in self._serve(request, answered=answered, ticket=ticket, trunk=trunk):
            assert not isinstance(item, Prefilled | KvOffer)
            yield item

    async def release(self, ticket_id: str) -> bool:
        """Give the pages of a ticket back."""
        return await self._call(lambda: self._loop.release(ticket_id))

    async def cancel(self, request_id: str) -> None:
        """Forget a request, whatever state it is in."""
        await self._call(lambda: self._loop.forget(request_id))

    async def info(self) -> WorkerInfo:
        return await self._call(self._loop.describe)

    async def report(self, identity: Identity, quota: Quota | None, known_prefixes: int) -> WorkerLoad:
        """What there is to do here; with a quota, this is the role from now on."""
        return await self._call(lambda: self._loop.report(identity, quota, known_prefixes))

    async def drain(self, within_s: float) -> None:
        """Wait until nobody may fetch pages from here any more, but not longer than `within_s`."""
        ends_s = time.monotonic() + within_s
        with suppress(EngineError):
            while time.monotonic() < ends_s and await self._call(lambda: self._loop.num_leases > 0):
                await asyncio.sleep(_DRAIN_POLL_S)

    async def check_integrity(self) -> None:
        """Raises EngineError when a page is lost or doubly owned, or held for nobody who is here."""
        await self._call(self._loop.check_integrity)

    async def _serve(
        self,
        request: GenerationRequest,
        *,
        prefill_only: bool = False,
        in_parts: bool = False,
        answered: tuple[int, ...] = (),
        ticket: KvTicket | None = None,
        trunk: Trunk | None = None,
    ) -> AsyncGenerator[StreamItem | PrefillItem | Alive | Elsewhere]:
        self.check()
        inbox = Inbox()
        client = Client(request, inbox, time.monotonic(), prefill_only, in_parts, answered, ticket)
        self._commands.put(Command(lambda: self._loop.admit(client), lambda error: inbox.push(Failed(error))))
        over = False
        try:
            while not over:
                item = await inbox.take(self._pulse_s)
                over = ends(item)
                if trunk is None or not trunk.is_open or over or not isinstance(item, Tokens):
                    yield item
                    continue
                trunk.divert(request.request_id, inbox, item)
                yield Elsewhere()
                last = await inbox.take()
                over = inbox.is_diverted
                if not over:
                    yield last
                    return
        finally:
            if trunk is not None:
                trunk.leave(request.request_id)
            # The client went away: nobody reads what the engine would still compute.
            if not over:
                with suppress(EngineError):
                    self._commands.put(Command(lambda: self._loop.forget(request.request_id)))

    async def _call(self, function: Callable[[], Answer]) -> Answer:
        self.check()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def settle(set_value: Callable[[], None]) -> None:
            # A caller that was cancelled wants no answer.
            tell(loop, lambda: None if answer.done() else set_value())

        def act() -> None:
            try:
                value = function()
            except Exception as problem:
                refuse(problem)
            else:
                settle(lambda: answer.set_result(value))

        def refuse(problem: Exception) -> None:
            settle(lambda: answer.set_exception(problem))

        self._commands.put(Command(act, refuse))
        return await answer

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._loop.turn(self._commands)
        except Exception as problem:
            logger.exception("the engine of the %s worker failed", self._role)
            self._dead = f"{type(problem).__name__}: {problem}"
        finally:
            # First closed, then told: whoever comes in between is refused by the mailbox.
            self._commands.close(self._ended())
            self._loop.fail_all(self._ended())

    def _ended(self) -> EngineError:
        return EngineError(f"the {self._role} worker stopped: {self._dead or 'shutting down'}")
