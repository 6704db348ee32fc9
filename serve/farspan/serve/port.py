"""Whether this machine can listen where a config says, before anything is started."""

from __future__ import annotations

import errno
import socket

from farspan.errors import ConfigError

_BACKLOG = 2048


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def refuse_taken_port(host: str, port: int) -> None:
    """Raises ConfigError when `port` of `host` cannot be listened on here."""
    _bound(host, port, shared=False).close()


def listening_socket(host: str, port: int) -> socket.socket:
    """One that takes connections from now on; others of this user may listen beside it, if theirs is made here too.

    Raises ConfigError when `port` of `host` cannot be listened on here.
    """
    return _bound(host, port, shared=True)


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError("host", "must be an address of this machine", host, "use host=127.0.0.1") from None
    sock = socket.socket(family, kind, protocol)
    # As the server does: what a server that just ended left behind is not in the way.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as problem:
        sock.close()
        if problem.errno == errno.EADDRNOTAVAIL:
            raise ConfigError("host", "must be an address of this machine", host, "use host=127.0.0.1") from None
        if problem.errno == errno.EACCES:
            raise ConfigError("port", "must be one this user may open", port, "use port=8000") from None
        raise ConfigError("port", "must be free on this machine", port, "use port=<a free one>") from None
    return sock
