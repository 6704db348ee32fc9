"""Tells a decode worker of the pages of a prompt while a prefill worker still computes it.

Only a hint: whatever fails here, the ticket at the end brings everything.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Any

from farspan.kv.ticket import KvOffer
from farspan.serve.faults import LOST
from farspan.serve.messages import GenerationRequest

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 10.0


class Relay:
    """The offers of one request, on their way to the decode worker that will answer it.

    No place is kept there meanwhile: nobody would give it back for an ingress that died.
    """

    def __init__(self, decode: Any, request: GenerationRequest) -> None:
        """`decode`: the handle of the decode workers."""
        self._decode, self._request = decode, request
        self._offers: asyncio.Queue[KvOffer] = asyncio.Queue()
        self._told: str | None = None
        self._telling: asyncio.Task[None] | None = None

    @property
    def has_told(self) -> bool:
        """Whether a worker may hold pages for it."""
        return self._telling is not None

    def tell(self, offer: KvOffer) -> None:
        """Pass an offer on, after those before it; returns at once."""
        if self._telling is None:
            # Like every call of a worker (router.py).
            self._telling = asyncio.get_running_loop().create_task(self._tell(), context=Context())
        self._offers.put_nowait(offer)

    def settle(self) -> str | None:
        """The worker that was told of the pages. Nothing more is told."""
        self.end()
        return self._told

    def end(self) -> None:
        """The worker is not needed any more."""
        if self._telling is not None:
            self._telling.cancel()

    async def _tell(self) -> None:
        try:
            async with self._decode.options(stream=True).resume.choose_replica(self._request) as chosen:
                self._told = chosen.replica_id
        except LOST as problem:
            logger.warning("no decode worker could be chosen early: %s", type(problem).__name__)
            return
        await self._tell_all(chosen.replica_id)

    async def _tell_all(self, replica_id: str) -> None:
        """One offer after the other, as long as the worker wants them."""
        worker = self._decode.options(session_id=replica_id, stream=False)
        try:
            while True:
                offer = await self._offers.get()
                # Where it is gone another takes the call, and does nothing.
                if not await asyncio.wait_for(worker.follow.remote(replica_id, offer), _TELL_TIMEOUT_S):
                    return
        except (TimeoutError, *LOST) as problem:
            logger.warning("an offer was not delivered: %s", type(problem).__name__)
