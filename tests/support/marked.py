"""Commands whose processes are known by a mark in their environment: what is left of them when they have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

FARSPAN = [sys.executable, "-m", "farspan.cli.main"]
MARK = "FARSPAN_TEST_MARK"


def processes_marked(mark: str) -> list[str]:
    """Command lines of living processes that inherited the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [command for command in found if command]


def assert_nothing_is_left(mark: str) -> None:
    """Within a minute no marked process is alive."""
    deadline = time.monotonic() + 60
    while left := processes_marked(mark):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def interrupted(words: Sequence[str], folder: Path, when: str) -> str:
    """What `farspan` says after Ctrl-C, which comes with the first line that begins with `when`; nothing is left."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*FARSPAN, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, MARK: mark},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert any(line.startswith(when) for line in process.stdout)
        # As a terminal does: every process of the foreground group gets it.
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
        assert_nothing_is_left(mark)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=30)
    return rest
