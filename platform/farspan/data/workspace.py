"""Where a corpus grows, and what is kept of it when the process that builds it dies.

The folder is locked (flock) by the process that builds. Each finished shard leaves a line in the journal: where in the
sources it ended and what was counted until then. A build of the same config over the same files goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from farspan.data.manifest import ShardInfo
from farspan.errors import UnreachableError
from farspan.storage.local import explained
from farspan.storage.manifest import describe_file
from farspan.storage.paths import LocalPlace, parse_uri

BUILDING = ".building-"
_JOURNAL = "journal.jsonl"


@dataclass
class Counts:
    """Everything a build counts, up to some record. `file` and `record` are the next ones to read."""

    file: int = 0
    record: int = 0
    records: int = 0
    tokens: int = 0
    split: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    source_documents: dict[str, int] = field(default_factory=dict)
    """By the number of the source; keys are texts, as in JSON."""
    source_tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class Journal:
    """The finished shards of a build, on disk as soon as each is finished; `folder` is what is published."""

    folder: Path
    fingerprint: str
    shards: list[ShardInfo] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def write(self, shard: ShardInfo, counts: Counts) -> None:
        """Remember that `shard` is finished."""
        self._append({"shard": asdict(shard), "counts": asdict(counts)})

    def begin(self) -> None:
        """Start an empty journal."""
        _journal_file(self.folder).unlink(missing_ok=True)
        self._append({"fingerprint": self.fingerprint})

    def _append(self, line: dict[str, Any]) -> None:
        with _journal_file(self.folder).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def resume(folder: Path, fingerprint: str) -> Journal:
    """The journal of an unfinished build of `fingerprint` in `folder`, with the shards whose bytes are still right."""
    journal = Journal(folder, fingerprint)
    lines = _journal_lines(folder)
    if not lines or lines[0] != {"fingerprint": fingerprint}:
        journal.begin()
        return journal
    names = {entry.name for entry in fields(Counts)}
    for line in lines[1:]:
        shard = ShardInfo(**line["shard"])
        file = folder / shard.file
        if not file.is_file() or describe_file(file, shard.file).sha256 != shard.sha256:
            break
        journal.shards.append(shard)
        journal.counts = Counts(**{name: value for name, value in line["counts"].items() if name in names})
    # Written anew: what follows the last whole shard must not be read again.
    kept = lines[1 : 1 + len(journal.shards)]
    journal.begin()
    for line in kept:
        journal._append(line)
    return journal


def _journal_file(folder: Path) -> Path:
    """Beside what is published."""
    return folder.parent / _JOURNAL


def _journal_lines(folder: Path) -> list[dict[str, Any]]:
    """Whole lines; a line that was cut by the end of the process is none."""
    file = _journal_file(folder)
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


@contextmanager
def workspace(output: str) -> Iterator[Path]:
    """The folder in which a corpus for `output` grows: beside a local output, so that publishing links files.

    It stays behind when the process dies or is interrupted, or when a store cannot be reached; it is removed when the
    build is done, and when going on could not help.

    Raises:
        UnreachableError: another process is building for `output`.
    """
    folder = _folder(output)
    with explained(output, "making a place to build in"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise UnreachableError(output, f"{folder} belongs to another user; remove it or choose another output")
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    keep = False
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            keep = True
            raise UnreachableError(output, "is being built by another process; wait until it is done") from None
        yield folder
    except UnreachableError as problem:
        # A disk that is full stays full while the half-built corpus is on it.
        keep = keep or problem.uri != output or not isinstance(parse_uri(output), LocalPlace)
        raise
    except BaseException as problem:
        keep = not isinstance(problem, Exception)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _folder(output: str) -> Path:
    place = parse_uri(output)
    if isinstance(place, LocalPlace):
        return place.folder.parent / f"{BUILDING}{place.folder.name}"
    name = hashlib.sha256(f"{os.getuid()} {output}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"farspan-corpus-{name}"
