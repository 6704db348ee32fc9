"""Events from workers to the process that watches them, through one small actor: the same local and on a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import ray

from farspan.telemetry.events import Event, EventBody, from_json, to_json


class EventMailbox:
    """The actor: keeps event lines until they are fetched."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class EventSender:
    """The worker's end. Sends are not awaited: a slow watcher never slows a step; `close` waits for the last one."""

    def __init__(self, mailbox: ray.actor.ActorHandle) -> None:
        self._mailbox = mailbox
        self._last: ray.ObjectRef | None = None

    def __call__(self, body: EventBody) -> None:
        self._last = self._mailbox.put.remote(to_json(Event(time.time(), body)))

    def close(self, timeout_s: float = 30.0) -> None:
        if self._last is not None:
            ray.get(self._last, timeout=timeout_s)


class EventWatcher:
    """The driver's end: a thread that fetches events and hands them to `tell`, in order, until the block ends."""

    def __init__(self, tell: Callable[[EventBody], None], interval_s: float = 0.3) -> None:
        self.mailbox = ray.remote(num_cpus=0)(EventMailbox).remote()
        self._tell = tell
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="farspan-events", daemon=True)

    def __enter__(self) -> EventWatcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=30.0)
        if kind is None or issubclass(kind, Exception):
            self._drain()
        ray.kill(self.mailbox)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._drain()

    def _drain(self) -> None:
        try:
            lines = ray.get(self.mailbox.take.remote(), timeout=30.0)
        except (ray.exceptions.RayError, TimeoutError):
            return
        for line in lines:
            self._tell(from_json(line).body)
