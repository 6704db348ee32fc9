"""Processes that hold KV pages and reach each other by NIXL over TCP, for tests that stop or kill one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.forking import forking

from farspan.errors import FarspanError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvOffer, KvTicket, LeaseTable
from farspan.kv.transports.nixl import NixlTransport

LAYOUT = KvLayout.uniform(
    model="m", num_layers=4, num_kv_heads=2, k_head_dim=64, v_head_dim=64, dtype="float32", page_tokens=16
)
NUM_PAGES = 96
DEADLINE_S, LEASE_S = 2.0, 60.0
_PATIENCE_S = 60.0


class Holder:
    """What one process does when it is told to; every method is a verb of `End`."""

    def __init__(self) -> None:
        self.pool = PagePool(LAYOUT, NUM_PAGES * LAYOUT.page_bytes)
        self.transport = NixlTransport(self.pool)
        self.leases = LeaseTable(self.pool, LEASE_S)
        self.puller = Puller(self.pool, self.transport, DEADLINE_S)
        self.claimed: list[int] = []
        self.growing: dict[str, list[int]] = {}

    def grow(self, request_id: str, first_byte: int, count: int, of: int) -> KvOffer | None:
        """Compute `count` more of the `of` pages of a prompt; page i is full of byte `first_byte` + i."""
        pages = self.growing.setdefault(request_id, [])
        for page in self.pool.alloc(count) or []:
            self.pool.storage_PB[page] = (first_byte + len(pages)) % 256
            pages.append(page)
        source = self.transport.address()
        return self.leases.grow(request_id, 0, pages, of * LAYOUT.page_tokens, source, time.time())

    def offer(self, request_id: str, first_byte: int, count: int) -> KvTicket:
        """The ticket of a prompt of `count` pages."""
        self.grow(request_id, first_byte, count - len(self.growing.get(request_id, [])), count)
        pages = self.growing.pop(request_id)
        source = self.transport.address()
        return self.leases.offer(request_id, pages, count * LAYOUT.page_tokens, source, time.time())

    def release(self, ticket_id: str) -> bool:
        return self.leases.release(ticket_id)

    def scribble(self, byte: int) -> None:
        """Give every free page to somebody who fills it, and take it back."""
        pages = self.pool.alloc(self.pool.num_free) or []
        self.pool.storage_PB[pages] = byte
        self.pool.free(pages)

    def follow(self, offer: KvOffer) -> bool:
        return self.puller.follow(offer, 0, time.monotonic(), time.time())

    def start(self, ticket: KvTicket) -> str:
        """Begin to fetch a ticket; why not, or nothing."""
        try:
            if self.puller.complete(ticket, time.monotonic(), time.time()):
                return ""
            pages = self.pool.alloc(len(ticket.pages))
            assert pages is not None
            try:
                self.puller.start(ticket, pages, time.monotonic(), time.time())
            except FarspanError:
                self.pool.free(pages)
                raise
        except FarspanError as problem:
            return str(problem)
        return ""

    def arrive(self) -> list[int] | str:
        """The first byte of each page that arrived and is given back, or why none did."""
        end = time.monotonic() + _PATIENCE_S
        while not (arrivals := self.puller.poll(time.monotonic())):
            assert time.monotonic() < end, "the transfer did not end"
            time.sleep(0.001)
        (arrival,) = arrivals
        if arrival.pages is None:
            return str(arrival.error)
        assert all((self.pool.storage_PB[page] == self.pool.storage_PB[page, 0]).all() for page in arrival.pages)
        found = [int(self.pool.storage_PB[page, 0]) for page in arrival.pages]
        self.pool.free(arrival.pages)
        return found

    def claim(self, byte: int) -> int:
        """Fill every free page and keep them; how many."""
        self.claimed = self.pool.alloc(self.pool.num_free) or []
        self.pool.storage_PB[self.claimed] = byte
        return len(self.claimed)

    def unclaim(self, byte: int) -> bool:
        """Whether they are still as they were; they are free again."""
        intact = bool((self.pool.storage_PB[self.claimed] == byte).all())
        self.pool.free(self.claimed)
        return intact

    def num_landed(self, first_byte: int, count: int) -> int:
        """How many pages of a prompt lie anywhere in the pool, whoever they belong to."""
        return sum(bool((self.pool.storage_PB == (first_byte + i) % 256).all(1).any()) for i in range(count))

    def counts(self) -> tuple[int, int, int]:
        """(free, held, quarantined) after another look."""
        assert self.puller.poll(time.monotonic()) == []
        self.pool.check_integrity()
        return self.pool.num_free, self.pool.num_held, self.pool.num_quarantined

    def address(self) -> Any:
        return self.transport.address()


def _run(pipe: Any) -> None:
    os.environ["UCX_TLS"] = "tcp"
    holder = Holder()
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            verb, *arguments = pipe.recv()
            pipe.send(getattr(holder, verb)(*arguments))


class End:
    """One of the processes."""

    def __init__(self) -> None:
        context = forking()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def __getattr__(self, verb: str) -> Any:
        def ask(*arguments: Any) -> Any:
            self._pipe.send((verb, *arguments))
            return self._hear()

        return ask

    def _hear(self) -> Any:
        assert self._pipe.poll(_PATIENCE_S), "it says nothing"
        return self._pipe.recv()

    def ready(self) -> End:
        assert self._hear() == "ready"
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        """Stop every thread of it, and see that they stand."""
        self.signal(signal.SIGSTOP)
        end = time.monotonic() + _PATIENCE_S
        while not all(" T " in task.read_text().rpartition(")")[2][:4] for task in self._tasks()):
            assert time.monotonic() < end, "it goes on"

    def _tasks(self) -> list[Path]:
        return list(Path(f"/proc/{self.process.pid}/task").glob("*/stat"))

    def end(self) -> None:
        self.process.kill()
        self.process.join(_PATIENCE_S)
        self._pipe.close()


@contextmanager
def ends(count: int) -> Iterator[list[End]]:
    """So many processes, which have ended afterwards."""
    made = [End() for _ in range(count)]
    try:
        yield [end.ready() for end in made]
    finally:
        for end in made:
            end.end()
