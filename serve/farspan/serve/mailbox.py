"""What travels between an engine's thread and asyncio: commands in, items out. Nothing is left unanswered."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from farspan.errors import EngineError
from farspan.serve.messages import Alive, PrefillItem, StreamItem, Tokens


def _nobody(_: EngineError) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Command:
    """`act` runs in the engine's thread, or `refuse` is told why it never will."""

    act: Callable[[], object]
    refuse: Callable[[EngineError], None] = _nobody


class Mailbox:
    """Commands for one thread. Each one that was taken in is either carried out or refused."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed: EngineError | None = None

    def put(self, command: Command) -> None:
        """Raises EngineError when nobody takes commands any more."""
        # Under the lock: a command must not slip in behind the last look into the queue.
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._commands.put(command)

    def take(self, patience_s: float) -> Iterator[Command]:
        """What is there; waits up to `patience_s` for the first."""
        with suppress(queue.Empty):
            yield self._commands.get(timeout=patience_s) if patience_s else self._commands.get_nowait()
            while True:
                yield self._commands.get_nowait()

    def close(self, error: EngineError) -> None:
        """Refuse what is inside, and whatever comes later; closing again changes nothing."""
        with self._lock:
            self._closed = self._closed or error
        for command in self.take(0.0):
            command.refuse(self._closed)


class Inbox:
    """Items from the engine's thread to one waiting coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[StreamItem | PrefillItem] = deque()
        self._filled = asyncio.Event()

    def push(self, item: StreamItem | PrefillItem) -> None:
        tell(self._loop, lambda: self._put(item))

    async def take(self, patience_s: float | None = None) -> StreamItem | PrefillItem | Alive:
        """The next item, or `Alive` when there is none for so long.

        Tokens that piled up while the reader was slow come together.
        """
        if not self._filled.is_set():
            try:
                async with asyncio.timeout(patience_s):
                    await self._filled.wait()
            except TimeoutError:
                return Alive()
        item = self._items.popleft()
        while isinstance(item, Tokens) and self._items and isinstance(self._items[0], Tokens):
            following = self._items.popleft()
            assert isinstance(following, Tokens)
            item = item.followed_by(following)
        if not self._items:
            self._filled.clear()
        return item

    def _put(self, item: StreamItem | PrefillItem) -> None:
        self._items.append(item)
        self._filled.set()


def tell(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Run `function` in `loop`, from any thread."""
    # The event loop of a caller that is gone is closed; there is nobody to tell.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
