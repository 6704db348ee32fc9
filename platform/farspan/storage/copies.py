"""A checked copy of a remote folder in a cache of this machine: made once, by one process at a time.

A copy is filled under a hidden name and revealed by one rename (staging.py); its name says which content of which place
it is. Whoever finds another process at it waits for that copy, as long as it grows.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from farspan.errors import CorruptDataError, NoAnswerError, NotFoundError, UnreachableError
from farspan.storage.local import LocalStore
from farspan.storage.manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    FileEntry,
    FolderManifest,
    describe_file,
    read_manifest,
    verify_folder,
)
from farspan.storage.patience import Result, patiently
from farspan.storage.staging import one_at_a_time, reveal, staging_folder
from farspan.storage.store import FileInfo, Store

Choose = Callable[[list[str], Callable[[str], bytes]], list[str]]
"""Of the files of a folder those to copy; the second argument reads one of them."""


def copy_remote(
    store: Store, manifest: FolderManifest | None, cache: Path, choose: Choose | None, patience_s: float
) -> Path:
    """The copy of `store` below `cache`, which is made where there is none.

    Raises what `publish.fetch_folder` raises.
    """
    source = _Source(store, manifest, patience_s)
    wanted = source.chosen(choose)
    target = cache / hashlib.sha256(f"{store.uri}\n{wanted!r}".encode()).hexdigest()[:32]
    with one_at_a_time(target):
        if _is_kept(target):
            return target
        with staging_folder(target) as staging:
            _refuse_without_room(store, wanted, staging)
            entries = tuple(source.fetch(file, staging) for file in wanted)
            source.confirm(wanted, FolderManifest(entries), staging)
            (staging / MANIFEST_NAME).write_bytes(FolderManifest(entries).to_json())
            reveal(staging, target)
    return target


class _Source:
    """A remote folder, asked again while it does not answer."""

    def __init__(self, store: Store, manifest: FolderManifest | None, patience_s: float) -> None:
        self._store, self._manifest, self._patience_s = store, manifest, patience_s

    def chosen(self, choose: Choose | None) -> list[FileInfo]:
        """The files to copy. Their versions are sha256 where the folder was published, else what the place tells."""
        files = self._files()
        if choose is None:
            return files
        read = self._store.read_bytes
        names = set(choose([file.path for file in files], lambda path: self._ask(partial(read, path))))
        return [file for file in files if file.path in names]

    def _files(self) -> list[FileInfo]:
        if self._manifest is not None:
            return [FileInfo(entry.path, entry.size, entry.sha256) for entry in self._manifest.files]
        files = self._ask(self._store.list)
        if not files:
            raise NotFoundError(self._store.uri, "no such folder, or an empty one; check the path")
        if any(file.path == UNFINISHED_NAME for file in files):
            raise CorruptDataError(self._store.uri, "an upload to it was cut off; publish the folder again")
        return files

    def fetch(self, file: FileInfo, staging: Path) -> FileEntry:
        target = staging / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._ask(lambda: self._store.download(file.path, target))
        except NotFoundError:
            reason = f"{file.path} is named by the folder but is not there; publish the folder again"
            raise CorruptDataError(self._store.uri, reason) from None
        if self._manifest is None:
            self._check(file, target)
        return describe_file(target, file.path)

    def _check(self, file: FileInfo, target: Path) -> None:
        """What somebody else wrote has no manifest, but its place tells sizes and mostly checksums."""
        if (size := target.stat().st_size) != file.size:
            reason = f"{file.path} arrived with {size} bytes instead of {file.size}; fetch it again"
            raise CorruptDataError(self._store.uri, reason)
        if (md5 := self._ask(lambda: self._store.md5(file))) is not None and _md5_of(target) != md5:
            reason = f"{file.path} is not what its place says it is (MD5 differs); fetch it again"
            raise CorruptDataError(self._store.uri, reason)

    def confirm(self, wanted: list[FileInfo], copied: FolderManifest, staging: Path) -> None:
        """Refuse a copy of two contents: files of a folder that was replaced meanwhile."""
        if self._manifest is not None:
            published = FolderManifest(tuple(FileEntry(file.path, file.size, file.version) for file in wanted))
            # Only what differs is read again, for the sentence that names it.
            if copied != published:
                verify_folder(staging, published)
        elif missing := set(wanted) - set(self._files()):
            changed = min(file.path for file in missing)
            raise CorruptDataError(self._store.uri, f"{changed} was replaced while it was fetched; fetch it again")

    def _ask(self, act: Callable[[], Result]) -> Result:
        return patiently(act, self._store.uri, self._patience_s, NoAnswerError)


def _refuse_without_room(store: Store, wanted: list[FileInfo], staging: Path) -> None:
    needed, free = sum(file.size for file in wanted), shutil.disk_usage(staging).free
    if needed > free:
        raise UnreachableError(
            str(staging.parent),
            f"a copy of {store.uri} needs {needed:,} bytes, and {free:,} are left; free disk space or choose another "
            "disk",
        )


def _is_kept(target: Path) -> bool:
    """Whether there is an earlier copy and every byte of it is still right."""
    try:
        manifest = read_manifest(LocalStore(str(target), target))
        if manifest is not None:
            verify_folder(target, manifest)
            return True
    except CorruptDataError:
        pass
    return False


def _md5_of(file: Path) -> str:
    with file.open("rb") as source:
        # Not for security: it is the checksum that the place keeps.
        return hashlib.file_digest(source, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
