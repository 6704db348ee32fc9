"""Publishing a folder as one step, and fetching it with every byte checked.

Local: the folder is filled beside its place under a hidden name, synced, and made visible by one rename.
S3: the old manifest goes first, then the files come, and the new manifest LAST; a folder without a valid manifest is
not there. See docs/decisions/0002-storage-door.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from farspan.errors import CorruptDataError, NoAnswerError, NotFoundError, StorageError, UnreachableError
from farspan.storage.copies import Choose, copy_remote
from farspan.storage.door import open_store
from farspan.storage.local import LocalStore, explained, sync_path, walk_files
from farspan.storage.manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    FileEntry,
    FolderManifest,
    describe_file,
    read_manifest,
    verify_folder,
)
from farspan.storage.paths import check_relative
from farspan.storage.patience import patiently
from farspan.storage.staging import put_back, remove_stale, reveal, staging_folder
from farspan.storage.store import Store


def publish_folder(source: Path, uri: str, *, frozen: bool = False) -> FolderManifest:
    """Make the files below `source` visible at `uri`, all of them or none.

    `frozen` promises that nobody writes into the files of `source` again: where the file system allows, they are
    linked instead of copied. A folder published before is replaced. Empty folders are not kept.

    Raises:
        NotFoundError: `source` holds no file.
        UnreachableError: the disk is full, the bucket refuses, or a local `uri` holds files that were not published.
    """
    with explained(str(source), "reading the folder to publish"):
        names = [file.relative_to(source).as_posix() for file in walk_files(source)]
    names = [check_relative(str(source), name) for name in names if name not in (MANIFEST_NAME, UNFINISHED_NAME)]
    if not names:
        raise NotFoundError(str(source), "holds no file to publish; check the path")
    store = open_store(uri)
    if isinstance(store, LocalStore):
        with explained(uri, "publishing"):
            return _publish_local(source, names, store, frozen)
    return _publish_remote(source, names, store)


def fetch_folder(
    uri: str,
    cache: Path,
    *,
    require_manifest: bool = True,
    contents: bool = True,
    choose: Choose | None = None,
    patience_s: float = 0.0,
) -> Path:
    """A local folder with the files of `uri`: itself when it is local, else a checked copy below `cache`.

    `require_manifest=False` also takes a folder that somebody else wrote (a Hugging Face folder): its bytes are checked
    against the sizes and checksums that the place tells. `contents=False` checks a local folder by file sizes only, for
    callers that check each file's sha256 when they first read it. `choose` says which files are copied; none: all. A
    place that does not answer is asked again for `patience_s`.

    Raises:
        NotFoundError: nothing is published there.
        CorruptDataError: a file is missing, or is not the one that was published.
        UnreachableError: the place does not answer, or there is no room for a copy. And what `choose` raises.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore):
        with explained(uri, "looking for the folder"):
            put_back(store.folder)
    manifest = patiently(lambda: read_manifest(store), uri, patience_s, NoAnswerError)
    if manifest is None and require_manifest:
        raise NotFoundError(uri, f"nothing is published there (no {MANIFEST_NAME}); check the path or publish again")
    if isinstance(store, LocalStore):
        if manifest is not None:
            verify_folder(store.folder, manifest, contents=contents)
        elif not store.list():
            raise NotFoundError(uri, "no such folder, or an empty one; check the path")
        return store.folder
    with explained(str(cache), f"keeping a copy of {uri}"):
        return copy_remote(store, manifest, cache, choose, patience_s)


def is_published(uri: str) -> bool:
    """Whether a folder with a valid manifest is there. Its files are not read."""
    try:
        return read_manifest(open_store(uri)) is not None
    except CorruptDataError:
        return False


def check_publishable(uri: str) -> None:
    """Refuse early, before hours of work, a place to which `publish_folder` could not publish.

    Raises:
        UnreachableError: the bucket does not answer, or a local folder holds files that were not published.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore):
        _refuse_foreign_files(store)
    else:
        store.list()


def _publish_local(source: Path, names: list[str], store: LocalStore, frozen: bool) -> FolderManifest:
    target = store.folder
    remove_stale(target)
    _refuse_foreign_files(store)
    with staging_folder(target) as staging:
        entries = [_place(source / name, staging, name, frozen) for name in names]
        manifest = FolderManifest(tuple(entries))
        (staging / MANIFEST_NAME).write_bytes(manifest.to_json())
        sync_path(staging / MANIFEST_NAME)
        for parent in sorted({(staging / name).parent for name in names} | {staging}):
            sync_path(parent)
        reveal(staging, target)
    return manifest


def _refuse_foreign_files(store: LocalStore) -> None:
    """Replacing a folder removes what is in it: only what farspan published itself may be removed."""
    if store.folder.exists() and not store.folder.is_dir():
        raise UnreachableError(store.uri, "is a file; choose another folder")
    present = {info.path for info in store.list()}
    try:
        manifest = read_manifest(store)
    except CorruptDataError:
        manifest = None
    known = {MANIFEST_NAME, *(entry.path for entry in manifest.files)} if manifest else set()
    if foreign := sorted(present - known):
        reason = f"holds {foreign[0]!r}, which farspan did not publish; move it away or choose another folder"
        raise UnreachableError(store.uri, reason)


def _place(file: Path, staging: Path, name: str, frozen: bool) -> FileEntry:
    target = staging / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (frozen and _linked(file, target)):
        shutil.copyfile(file, target)
    sync_path(target)
    # Read back from the copy, so that the manifest describes what readers will find.
    return describe_file(target, name)


def _linked(file: Path, target: Path) -> bool:
    if file.is_symlink():
        return False
    try:
        os.link(file, target)
    except OSError:
        return False
    return True


def _publish_remote(source: Path, names: list[str], store: Store) -> FolderManifest:
    with explained(str(source), "reading the folder to publish"):
        manifest = FolderManifest(tuple(describe_file(source / name, name) for name in names))
    try:
        old = read_manifest(store)
    except CorruptDataError:
        old = None
    # Without it a half-replaced folder would look like one that somebody else wrote without a manifest.
    store.write_bytes(UNFINISHED_NAME, b"publishing; the folder is not whole\n")
    store.delete(MANIFEST_NAME)
    for entry in manifest.files:
        store.upload(source / entry.path, entry.path)
    arrived = {info.path: info.size for info in store.list()}
    for entry in manifest.files:
        if arrived.get(entry.path) != entry.size:
            raise StorageError(store.uri, f"{entry.path} did not arrive whole; publish the folder again")
    store.write_bytes(MANIFEST_NAME, manifest.to_json())
    store.delete(UNFINISHED_NAME)
    kept = {entry.path for entry in manifest.files}
    for entry in old.files if old else ():
        if entry.path not in kept:
            store.delete(entry.path)
    return manifest
