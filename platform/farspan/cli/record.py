"""The event log of a run, wherever the run's folder lies, and the facts of the machine it ran on."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path

from farspan.storage.door import open_store
from farspan.storage.paths import LocalPlace, parse_uri
from farspan.telemetry.events import EventLog

EVENTS_FILE = "events.jsonl"


@contextmanager
def run_log(output: str) -> Iterator[EventLog]:
    """The log of the run at `output`; for S3 it is kept here and uploaded when the block ends."""
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
            with EventLog(file) as log:
                yield log
        finally:
            store.upload(file, EVENTS_FILE)


def machine_facts() -> dict[str, str]:
    """What a report says about the machine."""
    from datetime import datetime
    from importlib.metadata import version

    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("farspan", "torch", "ray", "transformers")),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
