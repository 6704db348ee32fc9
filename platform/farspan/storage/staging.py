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
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from farspan.errors import UnreachableError
from farspan.storage.local import sync_path

PUBLISHING = ".publishing-"
REPLACED = ".replaced-"
MAKING = ".making-"
# Longer than it takes to read the largest files once more, while nothing grows.
STALLED_S = 900.0
_POLL_S = 0.05
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


@contextmanager
def one_at_a_time(target: Path, stalled_s: float = STALLED_S) -> Iterator[None]:
    """For one process (or thread) at a time; others wait while what it stages for `target` grows.

    Where a file system has no locks nobody waits: two make the same, and one of them is kept.

    Raises:
        UnreachableError: nothing grew for `stalled_s`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f"{MAKING}{target.name}")
    lock = _waited_for(file, target, stalled_s)
    try:
        yield
    finally:
        # Before the lock is given up: who waits for a file that is gone makes a new one.
        file.unlink(missing_ok=True)
        os.close(lock)


def _waited_for(file: Path, target: Path, stalled_s: float) -> int:
    """The descriptor that holds the lock of `file`."""
    grown, since_s = -1, time.monotonic()
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        if _lock(handle) and _is_open(file, handle):
            return handle
        os.close(handle)
        if (now := _staged_bytes(target)) != grown:
            grown, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > stalled_s:
            reason = f"another process of this machine makes it and got nowhere for {stalled_s:g} s; end that process"
            raise UnreachableError(str(target), reason)
        time.sleep(_POLL_S)


def _is_open(file: Path, handle: int) -> bool:
    """Whether `handle` is that file still, or one that was removed since."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _staged_bytes(target: Path) -> int:
    num_bytes = 0
    for folder in _siblings(target, PUBLISHING):
        for parent, _, names in os.walk(folder):
            for name in names:
                # It may be renamed into place at this moment.
                with suppress(OSError):
                    num_bytes += Path(parent, name).stat().st_size
    return num_bytes


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
    put_back(target)
    for kind in (REPLACED, PUBLISHING):
        for folder in _siblings(target, kind):
            with _owned_when_dead(folder) as dead:
                if dead:
                    shutil.rmtree(folder, ignore_errors=True)


def put_back(target: Path) -> None:
    """Finish a replacement that was cut between its two renames: the old folder is visible again."""
    if target.exists() or not target.parent.is_dir():
        return
    for old in _siblings(target, REPLACED)[:1]:
        with _owned_when_dead(old) as dead:
            if dead:
                old.rename(target)


def _create_locked(target: Path) -> tuple[Path, int]:
    """A fresh folder and the descriptor that holds its lock."""
    while True:
        folder = target.parent / f"{PUBLISHING}{target.name}-{uuid.uuid4().hex}"
        folder.mkdir()
        # Another process may look at the folder before it is locked, take it for a dead one's and remove it.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            if _lock(lock) and folder.is_dir():
                return folder, lock
            os.close(lock)


def _lock(handle: int) -> bool:
    """False when somebody else holds the lock. True also where a file system has no locks: nothing there is ever
    taken for a dead process's.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _owned_when_dead(folder: Path) -> Iterator[bool]:
    """Whether no process owns `folder`; if so it is ours inside the context."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _exchange_or_rename(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as problem:
        if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "no renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _step_aside(folder: Path, target: Path) -> None:
    old = target.parent / f"{REPLACED}{target.name}-{uuid.uuid4().hex}"
    lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock)
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)


def _siblings(target: Path, kind: str) -> list[Path]:
    # The whole name must match: leftovers of `model-2` are not those of `model`.
    shape = re.compile(re.escape(f"{kind}{target.name}-") + "[0-9a-f]{32}")
    return sorted(entry for entry in target.parent.iterdir() if shape.fullmatch(entry.name))
