"""The event log of a run, wherever the run's folder lies, and the facts of the machine it ran on."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from farspan.errors import NotFoundError, UnreachableError
from farspan.storage.door import open_store
from farspan.storage.paths import LocalPlace, parse_uri
from farspan.storage.patience import patiently
from farspan.storage.store import Store
from farspan.telemetry.events import CheckpointPublished, Event, EventBody, EventLog

EVENTS_FILE = "events.jsonl"
_DEADLINE_S = 300.0


@contextmanager
def run_log(output: str) -> Iterator[EventLog]:
    """The log of the run at `output`; for S3 it is kept here and uploaded with each checkpoint and at the end."""
    place = parse_uri(output)
    if isinstance(place, LocalPlace):
        with EventLog(place.folder / EVENTS_FILE) as log:
            yield log
        return
    with tempfile.TemporaryDirectory(prefix="farspan-events-") as scratch:
        file = Path(scratch) / EVENTS_FILE
        store = open_store(output)
        if store.exists(EVENTS_FILE):
            store.download(EVENTS_FILE, file)
        try:
            with _UploadedLog(file, store) as log:
                yield log
        finally:
            patiently(lambda: store.upload(file, EVENTS_FILE), output, _DEADLINE_S)


class _UploadedLog(EventLog):
    """A log whose copy in the object store is as new as the newest checkpoint there."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(path)
        self._store = store

    def append(self, body: EventBody) -> Event:
        event = super().append(body)
        if isinstance(body, CheckpointPublished):
            # A store that does not answer now gets it with the next checkpoint.
            with suppress(UnreachableError):
                self._store.upload(self.path, EVENTS_FILE)
        return event


@contextmanager
def recorded_log(output: str) -> Iterator[Path]:
    """The log of a run that was started before, for reading; also while it goes on.

    Raises:
        NotFoundError: no run left its record there.
        UnreachableError: it cannot be read.
    """
    place = parse_uri(output)
    store = open_store(output)
    if not store.exists(EVENTS_FILE):
        raise NotFoundError(output, f"holds no {EVENTS_FILE}; name the output folder of a run")
    if isinstance(place, LocalPlace):
        yield place.folder / EVENTS_FILE
        return
    with tempfile.TemporaryDirectory(prefix="farspan-events-") as scratch:
        store.download(EVENTS_FILE, Path(scratch) / EVENTS_FILE)
        yield Path(scratch) / EVENTS_FILE


def machine_facts() -> dict[str, str]:
    """What a report says about the machine."""
    from importlib.metadata import version

    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("farspan", "torch", "ray", "transformers")),
        "written": now(),
    }


def now() -> str:
    """Date and time as a report shows it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
