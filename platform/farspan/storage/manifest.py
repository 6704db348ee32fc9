"""What a published folder holds, in one file inside it: `farspan_manifest.json`.

A folder is published exactly when its manifest is there and valid: the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.errors import CorruptDataError, NotFoundError
from farspan.storage.local import explained
from farspan.storage.paths import check_relative
from farspan.storage.store import Store

MANIFEST_NAME = "farspan_manifest.json"
UNFINISHED_NAME = "farspan_publishing"
"""Stands in a remote folder from before its manifest is taken away until after the new one is there."""
_VERSION = 1
_CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as it was published. `sha256` in lower-case hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FolderManifest:
    """Every file of a published folder but the manifest itself, in path order."""

    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """Names this content: equal content, equal digest."""
        return hashlib.sha256(_canonical(self.files)).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def entry(self, path: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.path == path), None)

    def to_json(self) -> bytes:
        content = {"version": _VERSION, "digest": self.digest, "files": _rows(self.files)}
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(uri: str, data: bytes) -> FolderManifest:
        """Read a manifest that anybody may have written.

        Raises:
            CorruptDataError: not a manifest, not of this version, altered, or naming a path outside the folder.
        """
        try:
            content: Any = json.loads(data)
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']} is not {_VERSION}")
            rows = content["files"]
            files = tuple(FileEntry(str(row["path"]), int(row["size"]), str(row["sha256"])) for row in rows)
            manifest, digest = FolderManifest(files), content["digest"]
        except (ValueError, TypeError, KeyError) as problem:
            reason = f"{MANIFEST_NAME} is not a manifest ({problem}); publish the folder again"
            raise CorruptDataError(uri, reason) from None
        if manifest.digest != digest:
            raise CorruptDataError(uri, f"{MANIFEST_NAME} was altered; publish the folder again")
        for entry in files:
            check_relative(uri, entry.path)
        return manifest


def describe_file(file: Path, path: str) -> FileEntry:
    """Size and checksum of a local file, read once."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(path, size, digest.hexdigest())


def verify_folder(folder: Path, manifest: FolderManifest, *, contents: bool = True) -> None:
    """Check every file of a local folder against its manifest.

    Raises:
        CorruptDataError: naming the first file that is missing or differs, in size or (with `contents`) in sha256.
    """
    for entry in manifest.files:
        file = folder / entry.path
        if not file.is_file():
            raise _torn(folder, entry, "is missing")
        with explained(str(folder), f"checking {entry.path}"):
            if file.stat().st_size != entry.size:
                raise _torn(folder, entry, f"has {file.stat().st_size} bytes instead of {entry.size}")
            if contents:
                verify_file(folder, entry)


def verify_file(folder: Path, entry: FileEntry) -> None:
    """Check one file's sha256.

    Raises:
        CorruptDataError: it is not the file that was published.
    """
    if describe_file(folder / entry.path, entry.path) != entry:
        raise _torn(folder, entry, "is not the file that was published (sha256 differs)")


def read_manifest(store: Store) -> FolderManifest | None:
    """The manifest of a folder; None where there is none."""
    try:
        return FolderManifest.from_json(store.uri, store.read_bytes(MANIFEST_NAME))
    except NotFoundError:
        return None


def _torn(folder: Path, entry: FileEntry, what: str) -> CorruptDataError:
    return CorruptDataError(str(folder), f"{entry.path} {what}; delete the folder and make or fetch it again")


def _rows(files: tuple[FileEntry, ...]) -> list[dict[str, Any]]:
    return [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in files]


def _canonical(files: tuple[FileEntry, ...]) -> bytes:
    return json.dumps(_rows(files), separators=(",", ":"), sort_keys=True).encode()
