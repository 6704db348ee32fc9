"""A worker's end of one stream to an ingress, for the tokens of all its answers: an iteration is one message.

Each answer keeps a call of its own. What it says before its first tokens comes by the call, everything after by the
trunk; or all of it by the call, where no trunk is open then. Never by both in turns: nothing is overtaken.

Where many answers run, tokens of several iterations are one message: what a piece of an answer costs on its way to the
client is taken from engines, and from how many answers one ingress can tell.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from farspan.errors import ClusterError
from farspan.serve.life import PULSE_S
from farspan.serve.mailbox import Inbox, Item, ends
from farspan.serve.messages import Alive, Bundle, Failed, Tokens

# Between two messages, for each answer: about twice what its piece takes of ingress and proxy, so that telling takes
# no more than half a processor. Messages go out with a token, not between two: slower engines keep none back.
_SPACING_S = 0.004


class Trunk:
    """One stream, or what may become one."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: for which a token is kept, to be told together with later ones."""
        self.is_open, self.num_riders = False, 0
        self._longest_s, self._next_s = longest_s, -math.inf
        self._kept: list[tuple[str, Item]] = []
        self._filled, self._pressing = asyncio.Event(), asyncio.Event()
        self._diverted: dict[str, Inbox] = {}

    def divert(self, request_id: str, inbox: Inbox, first: Tokens) -> None:
        """From now on what an inbox gets goes by the trunk, after `first`; to the inbox only the last of it."""
        self._diverted[request_id] = inbox
        self._put(request_id, first)
        self._pressing.set()
        inbox.divert(partial(self._put, request_id))

    def leave(self, request_id: str) -> None:
        """Nothing more goes by the trunk for a request; unknown ones are no error."""
        if (inbox := self._diverted.pop(request_id, None)) is not None:
            inbox.restore()

    async def bundles(self, pulse_s: float) -> AsyncGenerator[Bundle | Alive]:
        """What is to be said, as soon as it is there; until there was no rider for the time of a pulse, as a stream
        keeps a worker from being stopped.
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
                self._filled.clear()
                self._pressing.clear()
                kept, self._kept = tuple(self._kept), []
                yield Bundle(kept)
        finally:
            self.is_open = False
            for request_id, inbox in list(self._diverted.items()):
                self.leave(request_id)
                inbox.put(Failed(ClusterError("the stream to the ingress broke off")))

    async def _gathered(self) -> None:
        """Wait until what is kept is worth a message; what begins or ends an answer always is."""
        loop = asyncio.get_running_loop()
        if not self._pressing.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._longest_s):
                    await self._pressing.wait()
        self._next_s = loop.time() + min(self._longest_s, len(self._diverted) * _SPACING_S)

    def _put(self, request_id: str, item: Item) -> None:
        self._kept.append((request_id, item))
        self._filled.set()
        if ends(item) or asyncio.get_running_loop().time() >= self._next_s:
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
