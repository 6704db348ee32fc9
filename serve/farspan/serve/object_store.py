"""KV pages as objects in Ray's object store: what `kv/transports/object_store.py` needs of Ray.

The process that has the pages puts their bytes, which Ray neither pickles nor unpickles, and passes the reference on.
It keeps none itself: an object lives as long as the read that asked for it, which ends by its deadline, before the
lease of its pages does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farspan.config.schema import TransferConfig
from farspan.errors import TransferError
from farspan.kv.pages import PagePool
from farspan.kv.transports.base import Transport
from farspan.kv.transports.choose import Chosen, choose_transport
from farspan.kv.transports.object_store import ObjectTransport, PageSource
from farspan.serve.agent import NAMESPACE
from farspan.serve.desk import Ask, Desk

logger = logging.getLogger(__name__)

_NAME = "farspan-pages-"
_START_S = 60.0
# How long the desk looks for something to do before it says that there is nothing.
_LOOK_S = 5.0
# A desk that says nothing at all for so much longer is frozen, or gone: it is asked again.
_SILENCE_S = 10.0
_AGAIN_S = 1.0
_END_S = 5.0
# Parts that are read from one source at a time: what they take of the store is bounded, and one that is frozen keeps
# no other waiting.
_MOST_UNDER_WAY = 4
# Workers restart under new names: those not read from for longest are forgotten beyond this many.
_MOST_PEERS = 256


def open_transport(config: TransferConfig, pool: PagePool) -> Chosen:
    """The transport that the config names, or that works here. Raises what `choose_transport` raises."""

    def open_objects() -> Transport:
        return ObjectTransport(pool, RayExchange, config.deadline_s)

    chosen = choose_transport(config.transport, pool, open_objects)
    logger.info("KV pages travel by %s: %s", chosen.transport.name, chosen.reason)
    return chosen


@dataclass(slots=True)
class _Peer:
    desk: ActorHandle | None = None
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST_UNDER_WAY))


class RayExchange:
    """`Exchange` over desks. Everything that waits for Ray does so in one thread of its own."""

    def __init__(self, source: PageSource) -> None:
        """Raises TransferError when the desk cannot be started."""
        self._source, self._desk = source, _start_desk(source.incarnation)
        # The one that was read from last comes last.
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._loop, self._over = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="object-store", daemon=True)
        self._thread.start()

    def ask_pages(self, source: str, pages: list[int], within_s: float) -> Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._pages(source, pages, within_s), self._loop)

    def ask_epochs(self, source: str, pages: list[int], within_s: float) -> Future[list[int]]:
        return asyncio.run_coroutine_threadsafe(self._epochs(source, pages, within_s), self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(_END_S)
        # Without Ray it is gone already, and asking would start a Ray of its own.
        if ray.is_initialized():
            ray.kill(self._desk)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        # Whatever is under way when this returns is cancelled.
        serving = asyncio.create_task(self._serve())
        await self._over.wait()
        serving.cancel()

    async def _serve(self) -> None:
        """Answer what others ask of this process."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S + _SILENCE_S):
                    asks = await self._desk.asked.remote(_LOOK_S)
                await asyncio.gather(*(self._answer(ask) for ask in asks))
            except (RayError, TimeoutError) as problem:
                # Ray starts a desk that was lost again; who waited there computes the prompt instead.
                logger.warning("the desk for KV pages does not answer: %s", type(problem).__name__)
                await asyncio.sleep(_AGAIN_S)
            except Exception:
                # Who asked computes the prompt instead, by its deadline; others still want answers.
                logger.exception("KV pages could not be put into the object store")
                await asyncio.sleep(_AGAIN_S)

    async def _answer(self, ask: Ask) -> None:
        told: Any
        try:
            told = self._source.epochs(ask.pages) if ask.of_epochs else await asyncio.to_thread(self._put, ask.pages)
        except TransferError as problem:
            told = problem
        except RayError as problem:
            told = TransferError(self._source.incarnation, f"the object store refused them: {type(problem).__name__}")
        async with asyncio.timeout(_SILENCE_S):
            await self._desk.answer.remote(ask.number, told)

    def _put(self, pages: list[int]) -> list[ray.ObjectRef]:
        """A reference inside a list: Ray would fetch a bare one to whomever it passes."""
        return [ray.put(self._source.copy_pages(pages))]

    async def _pages(self, source: str, pages: list[int], within_s: float) -> bytes:
        try:
            async with asyncio.timeout(within_s), self._peer(source).turns:
                (reference,) = await self._told(source, pages, within_s, of_epochs=False)
                data: bytes = await reference
                return data
        except (RayError, TimeoutError, ValueError) as problem:
            raise self._lost(source, problem) from None

    async def _epochs(self, source: str, pages: list[int], within_s: float) -> list[int]:
        try:
            async with asyncio.timeout(within_s):
                epochs: list[int] = await self._told(source, pages, within_s, of_epochs=True)
                return epochs
        except (RayError, TimeoutError, ValueError) as problem:
            raise self._lost(source, problem) from None

    async def _told(self, source: str, pages: list[int], within_s: float, *, of_epochs: bool) -> Any:
        """What the process behind `source` answers. Raises ValueError when Ray knows none."""
        peer = self._peer(source)
        # In a thread: Ray waits for its head, which may be away.
        desk: Any = peer.desk or await asyncio.to_thread(ray.get_actor, _NAME + source, namespace=NAMESPACE)
        peer.desk = desk
        told = await desk.ask.remote(pages, of_epochs, within_s)
        if isinstance(told, TransferError):
            raise told
        return told

    def _peer(self, source: str) -> _Peer:
        peer = self._peers.setdefault(source, _Peer())
        self._peers.move_to_end(source)
        while len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)
        return peer

    def _lost(self, source: str, problem: Exception) -> TransferError:
        self._peers.pop(source, None)
        logger.warning("KV pages of %s did not come by the object store: %s", source, type(problem).__name__)
        return TransferError(source, f"the source does not answer: {type(problem).__name__}")


def _start_desk(incarnation: str) -> ActorHandle:
    """The desk of this process, on its machine. It ends with the process."""
    options = {
        "name": _NAME + incarnation,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    desk = ray.remote(Desk).options(**options).remote()
    try:
        ray.get(desk.asked.remote(0.0), timeout=_START_S)
    except (RayError, TimeoutError) as problem:
        reason = f"no desk for KV pages started within {_START_S:g} s: {type(problem).__name__}"
        raise TransferError(incarnation, reason) from None
    return desk
