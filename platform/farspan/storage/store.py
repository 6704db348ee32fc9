"""What can be done with the files of a folder, wherever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a folder. `version` changes when its content does: an S3 ETag, or a local modification time."""

    path: str
    size: int
    version: str = ""


class Store(ABC):
    """The files below one folder. Every `path` is relative to it, with `/` between its parts.

    Every method raises NotFoundError where nothing is, UnreachableError where it could not be read or written, and
    CorruptDataError for a path that leads out of the folder.
    """

    uri: str

    @property
    @abstractmethod
    def arrow(self) -> tuple[FileSystem, str]:
        """(pyarrow file system, path in it) of this folder, for libraries that take one."""

    @abstractmethod
    def read_bytes(self, path: str) -> bytes: ...

    @abstractmethod
    def open_input(self, path: str) -> NativeFile:
        """Random-access Arrow file: a memory map when local, ranged requests when on S3. The caller closes it."""

    @abstractmethod
    def write_bytes(self, path: str, data: bytes) -> None:
        """Atomic: a reader sees the old bytes or the new ones."""

    @abstractmethod
    def upload(self, source: Path, path: str) -> None:
        """Write a local file to `path`, in parts where it is large; visible only when complete."""

    @abstractmethod
    def download(self, path: str, target: Path) -> None:
        """Write the bytes of `path` to the local file `target`, which may be half-written when this raises."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether `path` is a file."""

    @abstractmethod
    def size(self, path: str) -> int:
        """In bytes."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[FileInfo]:
        """All files at or below the folder `prefix`, in path order; empty when there is none."""

    def md5(self, file: FileInfo) -> str | None:
        """Checksum that the place itself keeps for a file of its listing, in lower-case hexadecimal; None: none."""
        return None

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove one file; fine when it is not there."""
