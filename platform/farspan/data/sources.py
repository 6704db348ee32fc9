"""Where records come from: files and folders, local or s3://, and this interpreter's standard library.

The order of files is that of the sources as written, and of paths within a source: the same files give the same
corpus.
"""

from __future__ import annotations

import fnmatch
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from farspan.config.schema import CorpusConfig
from farspan.errors import ConfigError, NotFoundError
from farspan.storage.door import open_store
from farspan.storage.paths import LocalPlace, S3Place, parse_uri
from farspan.storage.store import FileInfo, Store

STDLIB = "python:stdlib"
# Installed packages are not the standard library; its tests are mostly tables of cases, and some are meant to be
# unreadable; the rest are copies, generated tables and bytecode.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. `name` says where it came from and is stable between builds of the same source.

    `source` is the place of its source in the config; `version` changes when its bytes do.
    """

    name: str
    folder: str
    path: str
    size: int
    version: str
    source: int = 0

    @property
    def store(self) -> Store:
        """The folder it lies in; opened anew, so that a file can be read in another process."""
        return open_store(self.folder)

    def read(self) -> bytes:
        return self.store.read_bytes(self.path)


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder, and how many times an epoch holds its documents, in hundredths."""

    path: str
    weight_hundredths: int = 100


def sources_of(config: CorpusConfig) -> tuple[Source, ...]:
    """The sources of a checked config."""
    return tuple(
        Source(source) if isinstance(source, str) else Source(source["path"], round(source["weight"] * 100))
        for source in config.sources
    )


def find_files(paths: Sequence[str], pattern: str) -> list[SourceFile]:
    """Every file the sources name, in a fixed order, each once: it belongs to the first source that names it.

    `pattern` chooses among the files of folders by file name; a source that is itself a file is always taken.

    Raises:
        NotFoundError: a source that is not there.
        ConfigError: a source without a single matching file.
    """
    found: dict[str, SourceFile] = {}
    for number, path in enumerate(paths):
        files = list(_stdlib(pattern) if path == STDLIB else _files(path, pattern))
        if not files:
            raise ConfigError("sources", f"each must hold files named {pattern}", path, "set pattern=... to fit")
        for file in files:
            found.setdefault(file.name, replace(file, source=number))
    # A file named again later stays where it was: the files of one source lie together.
    return list(found.values())


def _stdlib(pattern: str) -> Iterator[SourceFile]:
    folder = sysconfig.get_paths()["stdlib"]
    for path in _below(Path(folder)):
        if fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern):
            stat = Path(folder, path).stat()
            yield SourceFile(f"{STDLIB}/{path}", folder, path, stat.st_size, str(stat.st_mtime_ns))


def _below(folder: Path) -> list[str]:
    """Files of the standard library, without descending into installed packages (there can be 100 000 of them)."""
    files: list[str] = []
    pending = [folder]
    while pending:
        for entry in pending.pop().iterdir():
            if entry.is_dir():
                if entry.name not in _STDLIB_SKIPPED and not entry.is_symlink():
                    pending.append(entry)
            elif entry.is_file():
                files.append(entry.relative_to(folder).as_posix())
    return sorted(files)


def _files(source: str, pattern: str) -> Iterator[SourceFile]:
    place = parse_uri(source)
    if (file := _as_file(place, source)) is not None:
        yield file
        return
    listed = open_store(source).list()
    if not listed:
        raise NotFoundError(source, "no such file or folder, or an empty one; correct `sources`")
    for info in listed:
        if fnmatch.fnmatchcase(info.path.rsplit("/", 1)[-1], pattern):
            yield SourceFile(f"{source.rstrip('/')}/{info.path}", source, info.path, info.size, info.version)


def _as_file(place: LocalPlace | S3Place, source: str) -> SourceFile | None:
    """The file when `source` names one."""
    if isinstance(place, LocalPlace):
        if not place.folder.is_file():
            return None
        folder, name = str(place.folder.parent), place.folder.name
    else:
        if not place.prefix:
            return None
        parent, _, name = place.prefix.rpartition("/")
        folder = f"s3://{place.bucket}/{parent}".rstrip("/")
        if not open_store(folder).exists(name):
            return None
    listed = [info for info in open_store(folder).list(name) if info.path == name]
    info = listed[0] if listed else FileInfo(name, open_store(folder).size(name))
    return SourceFile(source, folder, name, info.size, info.version)
