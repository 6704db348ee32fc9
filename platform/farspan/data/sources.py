"""Where documents come from: files and folders, local or s3://, and this interpreter's standard library.

The order of documents is that of the sources as written, and of paths within a source: the same files give the same
corpus.
"""

from __future__ import annotations

import fnmatch
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from farspan.errors import ConfigError, NotFoundError
from farspan.storage.door import open_store
from farspan.storage.paths import LocalPlace, S3Place, parse_uri
from farspan.storage.store import Store

STDLIB = "python:stdlib"
# Installed packages are not the standard library; its tests are mostly tables of cases, and some are meant to be
# unreadable; the rest are copies, generated tables and bytecode.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class Document:
    """One file of a source. `name` says where it came from and is stable between builds of the same source."""

    name: str
    store: Store
    path: str

    def read(self) -> bytes:
        return self.store.read_bytes(self.path)


def find_documents(sources: Sequence[str], pattern: str) -> list[Document]:
    """Every file the sources name, in a fixed order, each once.

    `pattern` chooses among the files of folders by file name; a source that is itself a file is always taken.

    Raises:
        NotFoundError: a source that is not there.
        ConfigError: a source without a single matching file.
    """
    found: dict[str, Document] = {}
    for source in sources:
        documents = list(_stdlib(pattern) if source == STDLIB else _files(source, pattern))
        if not documents:
            raise ConfigError("sources", f"each must hold files named {pattern}", source, "set pattern=... to fit")
        for document in documents:
            found.setdefault(document.name, document)
    return list(found.values())


def _stdlib(pattern: str) -> Iterator[Document]:
    folder = sysconfig.get_paths()["stdlib"]
    store = open_store(folder)
    for path in _below(Path(folder)):
        if fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern):
            yield Document(f"{STDLIB}/{path}", store, path)


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


def _files(source: str, pattern: str) -> Iterator[Document]:
    place = parse_uri(source)
    if (file := _as_file(place, source)) is not None:
        yield file
        return
    store = open_store(source)
    listed = store.list()
    if not listed:
        raise NotFoundError(source, "no such file or folder, or an empty one; correct `sources`")
    for info in listed:
        if fnmatch.fnmatchcase(info.path.rsplit("/", 1)[-1], pattern):
            yield Document(f"{source.rstrip('/')}/{info.path}", store, info.path)


def _as_file(place: LocalPlace | S3Place, source: str) -> Document | None:
    """The document when `source` names one file."""
    if isinstance(place, LocalPlace):
        if not place.folder.is_file():
            return None
        return Document(source, open_store(str(place.folder.parent)), place.folder.name)
    if not place.prefix:
        return None
    parent, _, name = place.prefix.rpartition("/")
    store = open_store(f"s3://{place.bucket}/{parent}".rstrip("/"))
    return Document(source, store, name) if store.exists(name) else None
