"""Where a secret must never stand: watched and searched for by a word that stands nowhere else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self


class ProcessWatch(threading.Thread):
    """Reads command line and environment of every process of this machine, those of hosts out of namespaces too.

    Keeps those in which a word stood, until it is told to stop.
    """

    def __init__(self, words: Sequence[str], in_environments: Sequence[str] | None = None) -> None:
        super().__init__(daemon=True)
        self._words = [word.encode() for word in words]
        self._in_environments = [word.encode() for word in (words if in_environments is None else in_environments)]
        self._over = threading.Event()
        self.seen: set[str] = set()
        self.namespaces: set[str] = set()
        """Of processes that were looked at, by the kernel's name."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.look()

    def look(self) -> None:
        """Once over all processes."""
        for folder in Path("/proc").glob("[0-9]*"):
            line = _read(folder / "cmdline")
            # Of another user's process a user reads the command line alone.
            environment = _read(folder / "environ")
            # It may have ended by now.
            with suppress(OSError):
                self.namespaces.add(os.readlink(folder / "ns" / "pid"))
            if any(word in line for word in self._words):
                self.seen.add(f"command line: {line!r}")
            if any(word in environment for word in self._in_environments):
                self.seen.add(f"environment of {line[:200]!r}")

    def stop(self) -> None:
        self._over.set()
        self.join(30)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def files_with(words: Iterable[str], folder: Path) -> set[str]:
    """Files below a folder, relative to it, in whose bytes or names a word stands."""
    wanted, found = [word.encode() for word in words], set()
    for file in folder.rglob("*"):
        # Links lead to files of others, or to these; sockets hold nothing.
        if file.is_symlink() or not file.is_file():
            continue
        name = str(file.relative_to(folder))
        if any(word in name.encode() or word in file.read_bytes() for word in wanted):
            found.add(name)
    return found
