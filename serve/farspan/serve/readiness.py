"""Whether workers answer, and fit together: asked for without a key, so however often it is asked, they hear little."""

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
        """`ask`: gives nothing where no worker is; `needed`: how many roles must have one; 0: all may be stopped."""
        self._ask, self._clock, self._needed = ask, clock, needed
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
            return 503, {"status": "waiting", "reason": str(problem)}
        finally:
            self._told_at_s = self._clock()
        roles = list(dict.fromkeys(info.role for info in infos))
        if len(roles) < self._needed:
            there = f"only a worker for {roles[0]} answers" if roles else "no worker is there"
            return 503, {"status": "waiting", "reason": there}
        if not roles:
            return 200, {"status": "asleep", "roles": roles}
        if (reason := _unlike(infos)) is not None:
            return 503, {"status": "mismatched", "reason": reason}
        return 200, {"status": "ready", "roles": roles}


def _unlike(infos: Sequence[WorkerInfo]) -> str | None:
    """Why workers cannot exchange pages that should; none: all can that hold the same kind of pages.

    While a new checkpoint takes over there are workers of two kinds; one kind must do all there is to do.
    """
    roles = {info.role for info in infos}
    alike = {info.layout: [other for other in infos if other.layout == info.layout] for info in infos}
    whole = [some for some in alike.values() if {info.role for info in some} == roles]
    if not whole:
        return "workers have different models or KV layouts"
    if any(len({info.transport for info in some}) > 1 for some in whole):
        spoken = ", ".join(dict.fromkeys(f"a {info.role} worker {info.transport}" for info in infos))
        return f"KV pages cannot travel: {spoken}; set transfer.transport"
    return None
