"""Choose a transport once, when a worker starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from farspan.errors import ConfigError, TransferError
from farspan.kv.pages import PagePool
from farspan.kv.transports.base import Transport


@dataclass(frozen=True, slots=True)
class Chosen:
    """A transport between processes."""

    transport: Transport
    reason: str
    """Why this one, in words."""


def choose_transport(name: str, pool: PagePool, open_objects: Callable[[], Transport]) -> Chosen:
    """The transport called `name`; auto: nixl, and where that cannot work the object store, as `open_objects` gives it.

    Raises TransferError when it cannot work here, ConfigError when there is no such transport.
    """
    if name not in ("auto", "nixl", "object_store"):
        rule, way_out = "must be auto, nixl or object_store", "use transfer.transport=auto"
        raise ConfigError("transfer.transport", rule, name, way_out)
    if name == "object_store":
        return Chosen(open_objects(), "transfer.transport asks for it")
    from farspan.kv.transports.nixl import NixlTransport

    try:
        transport = NixlTransport(pool)
    except TransferError as problem:
        if name == "nixl":
            raise
        return Chosen(open_objects(), problem.reason)
    return Chosen(transport, "transfer.transport asks for it" if name == "nixl" else "NIXL works here")
