"""Tells a decode worker of the pages of a prompt while a prefill worker still computes it.

Only a hint: whatever fails here, the ticket at the end brings everything.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from farspan.kv.ticket import KvOffer
from farspan.serve.messages import GenerationRequest

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 10.0


class Relay:
    """The offers of one request, on their way to the decode worker that will answer it."""

    def __init__(self, decode: Any, request: GenerationRequest) -> None:
        """`decode`: the handle of the decode workers, for calls that stream."""
        self._decode, self._request = decode, request
        self._offers: asyncio.Queue[KvOffer] = asyncio.Queue()
        self._chosen: Any = None
        self._over = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None
        self._holding: asyncio.Task[None] | None = None

    @property
    def has_told(self) -> bool:
        """Whether a worker may hold pages for it."""
        return self._holding is not None

    def tell(self, offer: KvOffer) -> None:
        """Pass an offer on, after those before it; returns at once."""
        if self._holding is None:
            self._holding = asyncio.ensure_future(self._hold())
        self._offers.put_nowait(offer)

    def settle(self) -> Any:
        """The worker that was told of the pages, as Serve knows it, or None. Nothing more is told."""
        for task in (self._telling, None if self._chosen is not None else self._holding):
            if task is not None:
                task.cancel()
        return self._chosen

    def dispatch(self, chosen: Any, *arguments: Any) -> Any:
        """Ask the worker that was told for the answer."""
        return self._decode.dispatch(chosen, *arguments)

    def end(self) -> None:
        """The worker is not needed any more."""
        self.settle()
        self._over.set()

    async def _hold(self) -> None:
        """Keep a place at one worker, for the answer that it will be asked for, until the answer is over."""
        try:
            async with self._decode.resume.choose_replica(self._request) as chosen:
                self._chosen = chosen
                self._telling = asyncio.ensure_future(self._tell_all(chosen.replica_id))
                await self._over.wait()
        except (RayError, RayServeException) as problem:
            logger.warning("no decode worker could be chosen early: %s", type(problem).__name__)
        finally:
            self._chosen = None

    async def _tell_all(self, replica_id: str) -> None:
        """One offer after the other, as long as the worker wants them."""
        try:
            while True:
                offer = await self._offers.get()
                # To all, as Serve has no call of a worker by its name: only the one that is meant does anything.
                told = self._decode.broadcast("follow", replica_id, offer)
                taken = await told.results_async(timeout_s=_TELL_TIMEOUT_S, return_exceptions=True)
                if True not in taken:
                    return
        except (TimeoutError, RayError, RayServeException, RuntimeError) as problem:
            logger.warning("an offer was not delivered: %s", type(problem).__name__)
