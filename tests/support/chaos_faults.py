"""What can happen to a process from outside: it is killed, stopped, or every connection it has is reset."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

PAUSE_S = 5.0
_PIDFD_GETFD = 438
_ESTABLISHED = "01"


class Fault(StrEnum):
    KILLED = "killed"
    PAUSED = "paused"
    """Stopped for five seconds."""
    FROZEN = "frozen"
    """Stopped, and woken when nobody needs it any more: what it still believes then must change nothing."""
    LEFT = "left"
    """Stopped for ever."""
    RESET = "reset"
    """Every TCP connection ends with RST, on both sides."""


@contextmanager
def inflicted(pid: int, fault: Fault) -> Iterator[None]:
    """What happens happens at the beginning of the block; one that is only frozen wakes at its end."""
    if fault is Fault.KILLED:
        os.kill(pid, signal.SIGKILL)
    elif fault is Fault.RESET:
        assert reset_connections(pid), "it has no connection"
    else:
        os.kill(pid, signal.SIGSTOP)
    waking = threading.Timer(PAUSE_S, _wake, (pid,))
    if fault is Fault.PAUSED:
        waking.start()
    try:
        yield
    finally:
        waking.cancel()
        if fault in (Fault.PAUSED, Fault.FROZEN):
            _wake(pid)


def _wake(pid: int) -> None:
    # Somebody may have put another one in its place.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def reset_connections(pid: int) -> int:
    """Reset every established TCP connection of a process; how many there were."""
    libc, wanted = ctypes.CDLL(None, use_errno=True), _established()
    process, count = os.pidfd_open(pid), 0
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(descriptor) in wanted:
                    count += _reset(libc, process, int(descriptor.name))
    finally:
        os.close(process)
    return count


def _established() -> set[str]:
    """All that are on this machine, as links in /proc name them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {f"socket:[{fields[9]}]" for fields in lines if fields[3] == _ESTABLISHED}


def _reset(libc: ctypes.CDLL, process: int, descriptor: int) -> bool:
    """Connecting to nowhere sends RST, and the socket's owner reads that the connection was reset too."""
    ours = libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if ours < 0:
        return False
    try:
        nowhere = socket.AF_UNSPEC.to_bytes(2, "little").ljust(16, b"\0")
        return bool(libc.connect(ours, nowhere, len(nowhere)) == 0)
    finally:
        os.close(ours)
