"""A worker's end of one stream to an ingress, for the tokens of all its answers: an iteration or a few is one message.

Each answer keeps a call of its own. What it says before its first tokens comes by the call, everything after by the
trunk; or all of it by the call, where no trunk is open then. Never by both in turns: nothing is overtaken.

Where many answers run, tokens of several iterations are one message (decision 0082): what a piece of an answer costs on
its way to the client is taken from engines, and from how many answers one ingress can tell.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from farspan.errors import ClusterError
from farspan.serve.life import PULSE_S
from farspan.serve.mailbox import Inbox, Item, ends
from farspan.serve.messages import Alive, Bundle, Failed, Tokens

# Between two messages, for each answer: several times what its piece takes of ingress and proxy.
_SPACING_S = 0.006


class Trunk:
    """One stream, or what may become one."""

    def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`longest_s`: for which a token is kept, to be told together with later ones."""
        self.is_open, self.num_riders = False, 0
        self._longest_s, self._clock = longest_s, clock
        self._kept: dict[str, list[Item]] = {}
        self._since_s = self._told_s = -math.inf
        """Since when something is kept; when everything was told last."""
        self._rounds = 0
        """Iterations since then, by items of the request with most: too many where guesses bring several at a time."""
        self._urgent: set[str] = set()
        """Requests that begin or end: what is kept of them waits for nothing."""
        self._is_due = False
        self._filled, self._pressing = asyncio.Event(), asyncio.Event()
        self._diverted: dict[str, Inbox] = {}

    def divert(self, request_id: str, inbox: Inbox, first: Tokens) -> None:
        """From now on what an inbox gets goes by the trunk, after `first`; to the inbox only the last of it."""
        self._diverted[request_id] = inbox
        self._put(request_id, first, urgent=True)
        inbox.divert(partial(self._put, request_id))

    def leave(self, request_id: str) -> None:
        """Nothing more goes by the trunk for a request; unknown ones are no error."""
        if (inbox := self._diverted.pop(request_id, None)) is not None:
            inbox.restore()

    async def bundles(self, pulse_s: float) -> AsyncGenerator[Bundle | Alive]:
        """What is to be said, as soon as it is worth a message; until there was no rider for the time of a pulse, as a
        stream keeps a worker from being stopped.
        """
        self.is_open = True
        try:
            while True:
                try:
                    async with asyncio.timeout(pulse_s):
                        await self._filled.wait()
                except TimeoutError:
                    if not self.num_riders:
                        return
                    yield Alive()
                    continue
                await self._gathered()
                yield Bundle(self._taken())
        finally:
            self.is_open = False
            for request_id, inbox in list(self._diverted.items()):
                self.leave(request_id)
                inbox.put(Failed(ClusterError("the stream to the ingress broke off")))

    async def _gathered(self) -> None:
        """Wait until something of what is kept is worth a message."""
        if self._pressing.is_set():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._since_s + self._longest_s - self._clock()):
                await self._pressing.wait()
        self._is_due = self._is_due or not self._pressing.is_set()

    def _taken(self) -> tuple[tuple[str, Item], ...]:
        """All that is kept, if it is time for it; else what begins or ends, and the rest waits on."""
        if self._is_due:
            told, self._kept = self._kept, {}
            self._told_s, self._rounds = self._clock(), 0
        else:
            told = {request_id: self._kept.pop(request_id) for request_id in self._urgent}
        if not self._kept:
            self._filled.clear()
        self._is_due = False
        self._urgent.clear()
        self._pressing.clear()
        return tuple((request_id, item) for request_id, items in told.items() for item in items)

    def _put(self, request_id: str, item: Item, *, urgent: bool = False) -> None:
        now_s = self._clock()
        if not self._kept:
            self._since_s = now_s
        items = self._kept.setdefault(request_id, [])
        items.append(item)
        self._filled.set()
        if urgent or ends(item):
            self._urgent.add(request_id)
            self._pressing.set()
        self._rounds = max(self._rounds, len(items))
        # With the iteration that is nearest: half of one early is as good as half of one late.
        passed_s = now_s - self._told_s
        if passed_s + passed_s / (2 * self._rounds) >= min(self._longest_s, len(self._diverted) * _SPACING_S):
            self._is_due = True
            self._pressing.set()


class Trunks:
    """The trunks of a worker, by the names their ingresses gave them."""

    def __init__(self, pulse_s: float = PULSE_S, longest_s: float = 0.0) -> None:
        self._pulse_s, self._longest_s = pulse_s, longest_s
        self._known: dict[str, Trunk] = {}

    @contextmanager
    def rider(self, name: str) -> Iterator[Trunk]:
        """What a request may go by in the time of the block, once it is open: it may come after the request."""
        trunk = self._known.setdefault(name, Trunk(self._longest_s))
        trunk.num_riders += 1
        try:
            yield trunk
        finally:
            trunk.num_riders -= 1
            self._tidy(name)

    async def opened(self, name: str) -> AsyncGenerator[Bundle | Alive]:
        """What the trunk of a name says, to its end."""
        trunk = self._known.setdefault(name, Trunk(self._longest_s))
        yield Alive()
        bundles = trunk.bundles(self._pulse_s)
        try:
            async for bundle in bundles:
                yield bundle
        finally:
            await bundles.aclose()
            self._tidy(name)

    def _tidy(self, name: str) -> None:
        trunk = self._known[name]
        if not trunk.is_open and not trunk.num_riders:
            del self._known[name]
