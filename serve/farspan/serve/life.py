"""Signs of life: how a call that streams tells a worker that is frozen, or cut off, from one that computes.

Ray sees within milliseconds that a process ended, and never that it is frozen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from farspan.errors import ClusterError
from farspan.serve.messages import Alive, Elsewhere

# A stream with nothing to say says so this often.
PULSE_S = 1.0
# Longer than a worker is held up by others on its machine: whoever waits goes elsewhere then.
SILENT_S = 6.0
# Looks at a queue in the time after which a worker is silent.
_LOOKS = 6
_END = object()


@dataclass(frozen=True, slots=True)
class Watch:
    """What is expected of a call."""

    whom: str
    silent_s: float
    is_lost: Callable[[], bool] | None = None
    """For a call that may wait in a queue before anything is said: asked again and again until something is."""


async def unless_silent(stream: AsyncIterable[Any], watch: Watch) -> AsyncGenerator[Any]:
    """What `stream` says, without its signs of life. Raises ClusterError when nothing was said for too long."""
    items = aiter(stream)
    item = await (_next(items, watch, watch.silent_s) if watch.is_lost is None else _first(items, watch.is_lost, watch))
    silent_s: float | None = watch.silent_s
    while item is not _END:
        if not isinstance(item, Alive):
            yield item
        if isinstance(item, Elsewhere):
            # What tells that it is alive is told there.
            silent_s = None
        item = await _next(items, watch, silent_s)


async def _next(items: AsyncIterator[Any], watch: Watch, silent_s: float | None) -> Any:
    try:
        async with asyncio.timeout(silent_s):
            return await anext(items, _END)
    except TimeoutError:
        raise _silent(watch) from None


async def _first(items: AsyncIterator[Any], is_lost: Callable[[], bool], watch: Watch) -> Any:
    coming = asyncio.ensure_future(_awaited(items))
    try:
        while not (await asyncio.wait((coming,), timeout=watch.silent_s / _LOOKS))[0]:
            if is_lost():
                raise _silent(watch)
        return coming.result()
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait((coming,))


async def _awaited(items: AsyncIterator[Any]) -> Any:
    return await anext(items, _END)


def _silent(watch: Watch) -> ClusterError:
    return ClusterError(f"{watch.whom} was silent for {watch.silent_s:g} s")
