"""Several answers side by side, as one stream; and answers nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.types import Receive

from farspan.errors import ClusterError
from farspan.serve.faults import being_cancelled

Value = TypeVar("Value")


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


async def merged(answers: Sequence[AsyncGenerator[Value]]) -> AsyncGenerator[Value]:
    """The pieces of all answers as they come. The first failure ends them all."""
    # As many as there are answers: a slow client holds back everybody, nobody is held back by a neighbour.
    ready: asyncio.Queue[Value | BaseException | None] = asyncio.Queue(maxsize=len(answers))
    tasks = [asyncio.create_task(_forward(pieces, ready)) for pieces in answers]
    try:
        num_open = len(tasks)
        while num_open:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(pieces: AsyncGenerator[Value], ready: asyncio.Queue[Value | BaseException | None]) -> None:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await ready.put(piece)
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        # Without a word the reader would wait for ever.
        await ready.put(ClusterError("an answer was given up"))
    except Exception as problem:
        await ready.put(problem)
    else:
        await ready.put(None)


async def unless_gone(receive: Receive, work: Awaitable[Value]) -> Value:
    """What `work` gives; raises ClientGoneError, with `work` cancelled and over, as soon as the client has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
