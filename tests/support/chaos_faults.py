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
_TCP_ESTABLISHED, _UNIX_CONNECTED = "01", "03"


class Fault(StrEnum):
    KILLED = "killed"
    PAUSED = "paused"
    """Stopped for five seconds."""
    FROZEN = "frozen"
    """Stopped, and woken when nobody needs it any more: what it still believes then must change nothing."""
    LEFT = "left"
    """Stopped for ever."""
    RESET = "reset"
    """Every TCP connection ends with RST, on both sides; those of a host's agent are shut."""


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
    """Break every connection of a process over TCP, and to its host's agent; how many there were."""
    libc, over_tcp, to_agents = ctypes.CDLL(None, use_errno=True), _over_tcp(), _to_agents()
    process, count = os.pidfd_open(pid), 0
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                link = os.readlink(descriptor)
                if link in over_tcp | to_agents:
                    count += _break(libc, process, int(descriptor.name), with_reset=link in over_tcp)
    finally:
        os.close(process)
    return count


def _over_tcp() -> set[str]:
    """Established connections of this machine, as links in /proc name them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {f"socket:[{fields[9]}]" for fields in lines if fields[3] == _TCP_ESTABLISHED}


def _to_agents() -> set[str]:
    """Connections that an agent of the host cache accepted."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    ours = [fields for fields in lines if fields[-1].startswith("@farspan-host-")]
    return {f"socket:[{fields[6]}]" for fields in ours if fields[5] == _UNIX_CONNECTED}


def _break(libc: ctypes.CDLL, process: int, descriptor: int, *, with_reset: bool) -> bool:
    ours = libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if ours < 0:
        return False
    with socket.socket(fileno=ours) as shared:
        if not with_reset:
            shared.shutdown(socket.SHUT_RDWR)
            return True
        # Connecting to nowhere sends RST, and the socket's owner reads that the connection was reset too.
        nowhere = socket.AF_UNSPEC.to_bytes(2, "little").ljust(16, b"\0")
        return bool(libc.connect(ours, nowhere, len(nowhere)) == 0)
