"""The event log: an append-only file of events with one writer, readable after the writer was killed."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from farspan.errors import CorruptDataError, NotFoundError, UnreachableError
from farspan.telemetry.kinds import (
    CheckpointPublished,
    Event,
    EventBody,
    LayoutProbed,
    Note,
    PlanPredicted,
    PlanSteppedDown,
    RequestServed,
    RunFailed,
    RunFinished,
    RunPreempted,
    RunResized,
    RunRestarted,
    RunStarted,
    StepReport,
    from_json,
    to_json,
)

__all__ = [
    "CheckpointPublished",
    "Event",
    "EventBody",
    "EventFile",
    "EventLog",
    "LayoutProbed",
    "Note",
    "PlanPredicted",
    "PlanSteppedDown",
    "RequestServed",
    "RunFailed",
    "RunFinished",
    "RunPreempted",
    "RunResized",
    "RunRestarted",
    "RunStarted",
    "StepReport",
    "from_json",
    "read_events",
    "to_json",
]


@dataclass(frozen=True, slots=True)
class EventFile:
    """The events of a log, and how many bytes of an unfinished last line were left out."""

    events: tuple[Event, ...]
    torn_bytes: int

    @property
    def warning(self) -> str | None:
        """One sentence when the writer died in the middle of a line."""
        if not self.torn_bytes:
            return None
        return f"the writer stopped in the middle of a line: {self.torn_bytes} bytes after the last event are ignored"


class EventLog:
    """The one writer of a log. Opening a log whose last writer was killed drops its unfinished line and notes it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open `path` for appending, making it and its folder when they are missing.

        Raises:
            UnreachableError: it cannot be opened, or another writer has it.
        """
        self.path, self._clock = path, clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what `append` returned from has left this process.
            self._file = path.open("ab+", buffering=0)
        except OSError as problem:
            raise UnreachableError(str(path), f"cannot be opened for events ({problem.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            reason = "another process writes this event log; give each run a folder of its own"
            raise UnreachableError(str(path), reason) from None
        except OSError as problem:
            self._file.close()
            raise UnreachableError(str(path), f"cannot be locked for events ({problem.strerror})") from None
        self._size = self._drop_torn_line()

    def append(self, body: EventBody) -> Event:
        """Write one event, stamped with the clock. A line that does not fit on the disk leaves nothing behind.

        Raises:
            UnreachableError: the line could not be written.
        """
        event = Event(self._clock(), body)
        line = (to_json(event) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as problem:
            self._file.truncate(self._size)
            raise UnreachableError(str(self.path), f"cannot take an event ({problem.strerror})") from None
        if written != len(line):
            self._file.truncate(self._size)
            raise UnreachableError(str(self.path), f"took {written} of {len(line)} bytes of an event; free some space")
        self._size += len(line)
        return event

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_torn_line(self) -> int:
        self._file.seek(0)
        content = self._file.readall()
        whole = content.rfind(b"\n") + 1
        torn = len(content) - whole
        self._size = whole
        if torn:
            self._file.truncate(whole)
            self.append(Note(text=f"An earlier writer stopped in the middle of a line; its {torn} bytes were dropped."))
        return self._size


def read_events(path: Path) -> EventFile:
    """Every event of a log. A line counts once its newline is written; what follows the last newline is torn.

    Raises:
        NotFoundError: there is no such log.
        UnreachableError: it cannot be read.
        CorruptDataError: a finished line is not an event; the line is named.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(str(path), "no such event log") from None
    except OSError as problem:
        raise UnreachableError(str(path), f"cannot be read ({problem.strerror})") from None
    *lines, torn = content.split(b"\n")
    return EventFile(tuple(_event(line, f"{path}:{i}") for i, line in enumerate(lines, start=1)), len(torn))


def _event(line: bytes, origin: str) -> Event:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise CorruptDataError(origin, "is not UTF-8") from None
    return from_json(text, origin)
