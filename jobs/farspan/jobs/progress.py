"""Events from workers to the process that watches them, through one small actor: the same local and on a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farspan.errors import ClusterError
from farspan.jobs.mailbox import EventMailbox
from farspan.telemetry.events import Event, EventBody, from_json, to_json

# How long a question for events may wait for its answer, and how often a wish that came meanwhile is looked for.
_WAIT_S, _LOOK_S = 20.0, 0.5
_DEADLINE_S = 60.0


class StopWish:
    """That a run should stop after its step, with a checkpoint. Asked for from any thread or signal handler."""

    def __init__(self, wider: StopWish | None = None) -> None:
        """`wider` is a wish that includes this one."""
        self._own: str | None = None
        self._wider = wider

    @property
    def reason(self) -> str | None:
        """Why, once somebody asked."""
        return (self._wider.reason if self._wider is not None else None) or self._own

    def ask(self, reason: str) -> None:
        self._own = reason


class EventSender:
    """The first rank's end: events out, the wish to stop in."""

    def __init__(self, mailbox: ray.actor.ActorHandle) -> None:
        self._mailbox = mailbox
        self._stop: str | None = None

    def __call__(self, body: EventBody) -> None:
        # Awaited, about a millisecond: an event in flight would be lost with this process.
        stop = self._mailbox.put.remote(to_json(Event(time.time(), body)))
        self._stop = ray.get(stop, timeout=_DEADLINE_S)

    def settle(self) -> None:
        """Wait until the watcher has written everything."""
        ray.get(self._mailbox.settle.remote(), timeout=_DEADLINE_S)

    def notice(self) -> str | None:
        """Why the watcher wants the run to stop, as of the last event."""
        return self._stop

    def preempted(self) -> str | None:
        """A node of the run that is being drained; collective."""
        return drained_nodes()


class SilentRank:
    """What every other rank has of the world outside."""

    def __call__(self, body: EventBody) -> None:
        return

    def settle(self) -> None:
        return

    def notice(self) -> str | None:
        return None

    def preempted(self) -> str | None:
        return drained_nodes()


def drained_nodes() -> str | None:
    """Which nodes of this run Ray is about to take away, in words; collective over Ray Train's workers."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    nodes = ", ".join(f"{node[:8]} (ranks {ranks})" for node, ranks in sorted(info.preempted_node_to_ranks.items()))
    return f"node {nodes} is being taken away"


class EventWatcher:
    """The driver's end: a thread that fetches events and hands them to `tell`, in order, until the block ends."""

    def __init__(self, tell: Callable[[EventBody], None], wish: StopWish | None = None) -> None:
        # On the watcher's own node: it lives exactly as long as somebody reads it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Its calls are nobody's tasks: Ray need not keep a record of each.
        made = ray.remote(num_cpus=0, scheduling_strategy=here, max_concurrency=16, enable_task_events=False)
        self.mailbox = made(EventMailbox).remote()
        self._tell, self._wish = tell, wish or StopWish()
        self._written = 0
        self._problem: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="farspan-events", daemon=True)

    def __enter__(self) -> EventWatcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self.mailbox.hurry.remote(self._wish.reason)
        self._thread.join(timeout=_DEADLINE_S)
        if kind is None or issubclass(kind, Exception):
            self._drain(0.0)
        ray.kill(self.mailbox)
        if self._problem is not None and (kind is None or issubclass(kind, Exception)):
            raise self._problem

    def _watch(self) -> None:
        while not self._stop.is_set() and self._drain(_WAIT_S):
            pass

    def _drain(self, wait_s: float) -> bool:
        """Fetch and write what there is; False when nothing more can be fetched or written."""
        if self._problem is not None:
            return False
        try:
            count, lines = self._take(wait_s)
        except ray.exceptions.RayError as problem:
            self._problem = ClusterError(f"the events of the run can no longer be read: {problem}")
            return False
        try:
            for line in lines:
                self._tell(from_json(line).body)
        except Exception as problem:
            # A log that cannot be written: the run ends at its next checkpoint, which waits for it.
            self._problem = problem
            return False
        self._written = count
        return True

    def _take(self, wait_s: float) -> tuple[int, list[str]]:
        """What is in the mailbox as soon as there is something; earlier where a wish has to be told."""
        told = self._wish.reason
        asked = self.mailbox.take.remote(self._written, told, wait_s)
        ends = time.monotonic() + wait_s
        # Looked for here: a question to another process each time would cost both of them more than the events do.
        while time.monotonic() < ends and not ray.wait([asked], timeout=_LOOK_S)[0]:
            if self._wish.reason != told:
                self.mailbox.hurry.remote(self._wish.reason)
                break
        return ray.get(asked, timeout=_DEADLINE_S)
