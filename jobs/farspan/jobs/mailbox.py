"""The actor between a run's first rank and whoever watches it. A process of its own, so it imports nothing large."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


class EventMailbox:
    """Keeps event lines until the watcher has fetched them, the watcher's wish that the run stops, and what room the
    run's workers have.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._fetched = 0
        self._written = 0
        self._stop: str | None = None
        self._hurried = False
        self._rooms: list[Any] = []
        self._changed = asyncio.Condition()

    async def put(self, line: str) -> str | None:
        """Keep a line; gives why the run should stop, if it should."""
        async with self._changed:
            self._lines.append(line)
            self._changed.notify_all()
        return self._stop

    async def take(self, written: int, stop: str | None, timeout_s: float) -> tuple[int, list[str]]:
        """(number of lines fetched so far, the new ones), as soon as there are any or somebody hurries.

        `written` lines are on disk; `stop` is why the run should stop.
        """
        async with self._changed:
            self._written, self._stop = written, stop
            self._changed.notify_all()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._lines) or self._hurried), timeout_s)
            self._hurried = False
            lines, self._lines = self._lines, []
            self._fetched += len(lines)
            return self._fetched, lines

    async def hurry(self, stop: str | None) -> None:
        """Who waits in `take`, or comes next, gets what there is at once; `stop` is why the run should stop."""
        async with self._changed:
            self._stop, self._hurried = stop, True
            self._changed.notify_all()

    async def hold(self, room: Any) -> None:
        """A placement group that the run's workers live in."""
        self._rooms.append(room)

    async def held(self) -> list[Any]:
        """Every placement group that was told of."""
        return self._rooms

    async def settle(self) -> None:
        """Return once every line put so far was written by the watcher."""
        async with self._changed:
            wanted = self._fetched + len(self._lines)
            await self._changed.wait_for(lambda: self._written >= wanted)
