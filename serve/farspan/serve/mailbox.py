"""What travels between an engine's thread and asyncio: commands in, items out. Nothing is left unanswered."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from farspan.errors import EngineError
from farspan.serve.messages import Alive, Failed, Prefilled, PrefillItem, StreamItem, Tokens

Item = StreamItem | PrefillItem


def ends(item: Item | Alive) -> bool:
    """Whether nothing comes after it."""
    return isinstance(item, Prefilled | Failed) or (isinstance(item, Tokens) and item.finish is not None)


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
        self.loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()
        self._elsewhere: Callable[[Item], None] | None = None

    @property
    def is_diverted(self) -> bool:
        return self._elsewhere is not None

    def push(self, item: Item) -> None:
        """From any thread."""
        tell(self.loop, lambda: self.put(item))

    def put(self, item: Item) -> None:
        """In the loop of whoever takes it."""
        if self._elsewhere is not None:
            self._elsewhere(item)
            if not ends(item):
                return
        self._items.append(item)
        self._filled.set()

    def divert(self, elsewhere: Callable[[Item], None]) -> None:
        """What is here, and what comes, is put `elsewhere`; only the last item of all is here too."""
        self._elsewhere = elsewhere
        items = list(self._items)
        self._clear()
        for item in items:
            self.put(item)

    def restore(self) -> None:
        """Nothing is put elsewhere any more, and nothing that was is here."""
        self._elsewhere = None
        self._clear()

    def _clear(self) -> None:
        self._items.clear()
        self._filled.clear()

    async def take(self, patience_s: float | None = None) -> Item | Alive:
        """The next item, or `Alive` when there is none for so long.

        Tokens that piled up while the reader was slow come together.
        """
        if patience_s is None:
            await self._filled.wait()
        elif not self._filled.is_set():
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


class Outbox:
    """What the engine's thread has for inboxes. A loop is woken once for all of it: each wake-up takes the
    interpreter's lock from the engine.
    """

    def __init__(self) -> None:
        self._kept: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, Item]]] = {}

    def put(self, inbox: Inbox, item: Item) -> None:
        """Keep an item until the next `send`."""
        self._kept.setdefault(inbox.loop, []).append((inbox, item))

    def send(self) -> None:
        """Hand everything over, in the order in which it was put."""
        kept, self._kept = self._kept, {}
        for loop, items in kept.items():
            tell(loop, partial(_put_all, items))


def _put_all(items: Sequence[tuple[Inbox, Item]]) -> None:
    for inbox, item in items:
        inbox.put(item)


def tell(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Run `function` in `loop`, from any thread."""
    # The event loop of a caller that is gone is closed; there is nobody to tell.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
