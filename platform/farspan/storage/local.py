"""Files of this machine."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSystem, LocalFileSystem

from farspan.errors import NotFoundError, UnreachableError
from farspan.storage.paths import check_relative
from farspan.storage.store import FileInfo, Store

WRITING = ".writing-"


class LocalStore(Store):
    """The files below `folder`. Half-written files (`.writing-*`) of killed processes are never listed."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self.folder = folder

    @property
    def arrow(self) -> tuple[FileSystem, str]:
        return LocalFileSystem(), str(self.folder)

    def read_bytes(self, path: str) -> bytes:
        with explained(self.uri, f"reading {path}"):
            return self._at(path).read_bytes()

    def open_input(self, path: str) -> pa.NativeFile:
        with explained(self.uri, f"opening {path}"):
            return pa.memory_map(str(self._at(path)), "r")

    def write_bytes(self, path: str, data: bytes) -> None:
        with self._replacing(path) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def upload(self, source: Path, path: str) -> None:
        with self._replacing(path) as partial:
            shutil.copyfile(source, partial)
            sync_path(partial)

    def download(self, path: str, target: Path) -> None:
        with explained(self.uri, f"copying {path}"):
            shutil.copyfile(self._at(path), target)

    def exists(self, path: str) -> bool:
        with explained(self.uri, f"looking for {path}"):
            return self._at(path).is_file()

    def size(self, path: str) -> int:
        with explained(self.uri, f"looking at {path}"):
            return self._at(path).stat().st_size

    def list(self, prefix: str = "") -> list[FileInfo]:
        top = self._at(prefix) if prefix else self.folder
        with explained(self.uri, "listing"):
            files = [top] if top.is_file() else walk_files(top) if top.is_dir() else []
            return sorted((self._info(file) for file in files), key=lambda info: info.path)

    def delete(self, path: str) -> None:
        with explained(self.uri, f"deleting {path}"):
            self._at(path).unlink(missing_ok=True)

    def _at(self, path: str) -> Path:
        return self.folder / check_relative(self.uri, path)

    def _info(self, file: Path) -> FileInfo:
        stat = file.stat()
        return FileInfo(file.relative_to(self.folder).as_posix(), stat.st_size, str(stat.st_mtime_ns))

    @contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        target = self._at(path)
        partial = target.with_name(f"{WRITING}{uuid.uuid4().hex}")
        with explained(self.uri, f"writing {path}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield partial
                partial.replace(target)
                sync_path(target.parent)
            finally:
                partial.unlink(missing_ok=True)


def walk_files(folder: Path) -> list[Path]:
    """Every file below `folder`, in path order. Links to files are followed; links to folders are refused."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in folders:
            if (link := Path(parent, name)).is_symlink():
                raise UnreachableError(str(link), "is a link to a folder, which is not followed; put the files there")
        found.extend(Path(parent, name) for name in files if not name.startswith(WRITING))
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Turn what the operating system says into our tree, with the way out."""
    try:
        yield
    except OSError as problem:
        raise explain_os_error(uri, doing, problem) from problem


def explain_os_error(uri: str, doing: str, problem: OSError) -> NotFoundError | UnreachableError:
    """One sentence for one failed system call."""
    if isinstance(problem, FileNotFoundError | NotADirectoryError):
        return NotFoundError(uri, f"{doing} failed: nothing is there; check the path")
    ways_out = {
        errno.ENOSPC: "free disk space or choose another disk",
        errno.EDQUOT: "free disk space within your quota or choose another disk",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another disk",
        errno.EACCES: "check the permissions of that folder",
        errno.EPERM: "check the permissions of that folder",
        errno.EROFS: "choose a disk that can be written",
        errno.EIO: "the disk reports a defect: choose another disk",
    }
    way_out = ways_out.get(problem.errno or 0, "check the disk and the path")
    return UnreachableError(uri, f"{doing} failed: {problem.strerror or problem}; {way_out}")


def _raise(problem: OSError) -> None:
    raise problem
