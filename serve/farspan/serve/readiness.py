"""Whether a worker of each role answers: asked for without a key, so however often it is asked, workers hear little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from farspan.errors import FarspanError
from farspan.serve.messages import NUM_ROLES, WorkerInfo

_KEPT_S = 1.0


class Readiness:
    """One question to the workers at a time; its answer is everybody's, and is kept for a second."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[WorkerInfo]]],
        clock: Callable[[], float] = time.monotonic,
        *,
        needed: int = NUM_ROLES,
    ) -> None:
        """`needed`: how many roles must have a worker; 0: all may be stopped once they have answered."""
        self._ask, self._clock, self._needed, self._were_there = ask, clock, needed, False
        self._asking: asyncio.Task[tuple[int, dict[str, Any]]] | None = None
        self._told_at_s = 0.0

    async def told(self) -> tuple[int, dict[str, Any]]:
        """(status, content) of the answer."""
        if self._asking is None or self._is_old(self._asking):
            self._asking = asyncio.ensure_future(self._look())
        # Others wait for it too: it goes on when one of them leaves.
        return await asyncio.shield(self._asking)

    def _is_old(self, asking: asyncio.Task[tuple[int, dict[str, Any]]]) -> bool:
        if not asking.done():
            return False
        broken = asking.cancelled() or asking.exception() is not None
        return broken or self._clock() - self._told_at_s >= _KEPT_S

    async def _look(self) -> tuple[int, dict[str, Any]]:
        try:
            infos = await self._ask()
        except FarspanError as problem:
            if self._needed == 0 and self._were_there:
                return 200, {"status": "asleep", "roles": []}
            return 503, {"status": "waiting", "reason": str(problem)}
        finally:
            self._told_at_s = self._clock()
        if len({info.role for info in infos}) < self._needed:
            return 503, {"status": "waiting", "reason": f"only a worker for {infos[0].role} answers"}
        if len({info.layout for info in infos}) != 1:
            reason = "prefill and decode workers have different models or KV layouts"
            return 503, {"status": "mismatched", "reason": reason}
        if len({info.transport for info in infos}) != 1:
            spoken = ", ".join(f"a {info.role} worker {info.transport}" for info in infos)
            return 503, {"status": "mismatched", "reason": f"KV pages cannot travel: {spoken}; set transfer.transport"}
        self._were_there = True
        return 200, {"status": "ready", "roles": [info.role for info in infos]}
