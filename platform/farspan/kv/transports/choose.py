"""Choose a transport once, when a worker starts."""

from __future__ import annotations

from farspan.errors import ConfigError
from farspan.kv.pages import PagePool
from farspan.kv.transports.base import Transport


def choose_transport(name: str, pool: PagePool) -> Transport:
    """The transport called `name` (auto: nixl) between processes.

    Raises TransferError when it cannot work here, ConfigError when there is no such transport.
    """
    if name not in ("auto", "nixl"):
        raise ConfigError("transfer.transport", "must be auto or nixl", name, "use transfer.transport=auto")
    from farspan.kv.transports.nixl import NixlTransport

    return NixlTransport(pool)
