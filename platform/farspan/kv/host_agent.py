"""The process that owns a host's blocks: the index, and the memory as long as somebody maps it.

It never touches the content of a block. A client is a connection: when its process dies, the kernel closes it, and
what the client was reading or writing is given back at once. No clock is needed for that, and none can be wrong.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from farspan.kv.host_cache import Seat
from farspan.kv.host_index import HostCounts, HostIndex
from farspan.kv.host_wire import ANSWERED, ASKED, HEADER, HELLO, MAGIC, MOST_BYTES, Op, carry_out, is_ours, pack, unpack
from farspan.memory.shared import SharedTier

logger = logging.getLogger(__name__)
_POLL_S = 0.2
_READ_BYTES = 1 << 16
_MOST_CLIENTS = 256


@dataclass(eq=False, slots=True)
class _Client:
    """One connection: what arrived of its next frame, and what it has not read yet of the answer."""

    peer: socket.socket
    seat: Seat
    arrived: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)


class HostAgent:
    """Listens from the start; `run` answers, in one thread, until `stop`."""

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        """Raises TierError when the host has less memory."""
        self._tier = SharedTier.create(capacity_bytes, slot_bytes)
        self._index = HostIndex(self._tier.num_slots)
        # In no folder: there is nothing to leave behind, and nothing to guess.
        self.address = f"farspan-host-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.address)
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[int, _Client] = {}
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def counts(self) -> HostCounts:
        with self._lock:
            return self._index.counts()

    def check_integrity(self) -> None:
        """Raises EngineError when a slot is lost or doubly owned."""
        with self._lock:
            self._index.check_integrity()

    def stop(self) -> None:
        self._stopping.set()

    def run(self, linger_s: float) -> None:
        """Until `stop`, or until nobody was connected for so long."""
        alone_since_s = time.monotonic()
        try:
            while not self._stopping.is_set() and time.monotonic() - alone_since_s < linger_s:
                for key, events in self._selector.select(_POLL_S):
                    if key.data is None:
                        self._accept()
                    else:
                        self._attend(key.data, events)
                if self._clients:
                    alone_since_s = time.monotonic()
        finally:
            for number in list(self._clients):
                self._leave(number)
            self._selector.close()
            self._listener.close()
            self._tier.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        if not is_ours(peer) or len(self._clients) >= _MOST_CLIENTS:
            peer.close()
            return
        peer.setblocking(False)
        number = next(self._numbers)
        try:
            hello = HELLO.pack(MAGIC, self._tier.num_slots, self._tier.slot_bytes)
            socket.send_fds(peer, [hello], [self._tier.file])
        except OSError:
            peer.close()
            return
        self._clients[number] = _Client(peer, Seat(self._index, number))
        self._selector.register(peer, selectors.EVENT_READ, number)

    def _attend(self, number: int, events: int) -> None:
        client = self._clients[number]
        try:
            if events & selectors.EVENT_WRITE:
                del client.unsent[: client.peer.send(client.unsent)]
            elif not self._read(client):
                self._leave(number)
                return
        except BlockingIOError:
            pass
        except (OSError, ValueError) as problem:
            logger.warning("a client of the host cache is refused: %s", problem)
            self._leave(number)
            return
        # Whoever does not read its answer is not listened to: it costs nobody else anything.
        wanted = selectors.EVENT_WRITE if client.unsent else selectors.EVENT_READ
        self._selector.modify(client.peer, wanted, number)

    def _read(self, client: _Client) -> bool:
        """Take what arrived, and answer the frame if it is whole; false: the client is gone."""
        piece = client.peer.recv(_READ_BYTES)
        client.arrived += piece
        if len(client.arrived) < HEADER.size:
            return bool(piece)
        kind, size = HEADER.unpack_from(client.arrived)
        op = Op(kind)
        if size > MOST_BYTES:
            raise ValueError(f"a frame of {size} bytes; at most {MOST_BYTES} are read")
        end = HEADER.size + size
        if len(client.arrived) >= end:
            records = unpack(ASKED[op], bytes(client.arrived[HEADER.size : end]))
            del client.arrived[:end]
            with self._lock:
                answer = pack(ANSWERED[op], carry_out(client.seat, op, records))
            client.unsent += HEADER.pack(op, len(answer)) + answer
            with suppress(BlockingIOError):
                del client.unsent[: client.peer.send(client.unsent)]
        return bool(piece)

    def _leave(self, number: int) -> None:
        client = self._clients.pop(number)
        self._selector.unregister(client.peer)
        client.peer.close()
        with self._lock:
            client.seat.close()
