"""Where a process is asked for its KV pages, when they travel by Ray's object store: an actor beside it.

A process that computes cannot be called; it looks here for what others ask, and leaves its answers.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ask:
    """What somebody waits for."""

    number: int
    pages: list[int]
    of_epochs: bool
    """Not of what the pages hold."""


class Desk:
    """The actor. It keeps no answer: whoever asked gets it, or has gone and nobody does."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._asks: asyncio.Queue[Ask] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, pages: list[int], of_epochs: bool, within_s: float) -> Any:
        """What the process answers. Raises TimeoutError when it does not."""
        ask = Ask(next(self._numbers), pages, of_epochs)
        answer = self._waiting[ask.number] = asyncio.get_running_loop().create_future()
        self._asks.put_nowait(ask)
        try:
            async with asyncio.timeout(within_s):
                return await answer
        finally:
            del self._waiting[ask.number]

    async def asked(self, within_s: float) -> list[Ask]:
        """What was asked since the last look and is still waited for; looks for something until there is."""
        found: list[Ask] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                found.append(await self._asks.get())
        while not self._asks.empty():
            found.append(self._asks.get_nowait())
        return [ask for ask in found if ask.number in self._waiting]

    async def answer(self, number: int, answer: Any) -> None:
        """Tell whoever waits for it."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
