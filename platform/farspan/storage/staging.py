"""A hidden folder beside its future place, and the one rename that makes it visible.

`.publishing-<name>-<uuid>` is locked (flock) by the process that fills it. The kernel drops the lock when that
process ends, however it ends, so whoever can take the lock knows that the folder is a dead process's and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from farspan.storage.local import sync_path

PUBLISHING = ".publishing-"
REPLACED = ".replaced-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `target`, gone afterwards unless it was renamed into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    folder, lock = _create_locked(target)
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def reveal(folder: Path, target: Path) -> None:
    """Make the finished `folder` visible as `target`, replacing what is there in one step.

    Linux exchanges both names at once (renameat2). Where the file system cannot, the old folder first steps aside:
    for that moment neither is visible, and `remove_stale` puts the old one back should the process die in it.
    """
    try:
        _exchange_or_rename(folder, target)
    except OSError as problem:
        if problem.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
            raise
        _step_aside(folder, target)
    sync_path(target.parent)


def remove_stale(target: Path) -> None:
    """Clear what killed processes left beside `target`, and finish a replacement that was cut in two."""
    if not target.parent.is_dir():
        return
    for old in _siblings(target, REPLACED):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for folder in _siblings(target, PUBLISHING):
        if _owner_is_dead(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.parent / f"{PUBLISHING}{target.name}-{uuid.uuid4().hex}"
        folder.mkdir()
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # A file system without locks: nobody can take the folder for a dead one's then.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir():
                return folder, lock
        except FileNotFoundError:
            # Another publisher took the folder for a dead one's before it was locked.
            pass
        if lock >= 0:
            os.close(lock)


def _owner_is_dead(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _exchange_or_rename(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "no renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _step_aside(folder: Path, target: Path) -> None:
    old = target.parent / f"{REPLACED}{target.name}-{uuid.uuid4().hex}"
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _siblings(target: Path, kind: str) -> list[Path]:
    # The whole name must match: leftovers of `model-2` are not those of `model`.
    shape = re.compile(re.escape(f"{kind}{target.name}-") + "[0-9a-f]{32}")
    return sorted(entry for entry in target.parent.iterdir() if shape.fullmatch(entry.name))
