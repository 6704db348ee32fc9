"""Pages arrive exactly as they were offered, or not at all."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest

from farspan.errors import TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transfer import Event, State, Transfer
from farspan.kv.transports.base import ReadStatus
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.kv.transports.nixl import adjacent_runs

LAYOUT = KvLayout.uniform(
    model="m", num_layers=2, num_kv_heads=1, k_head_dim=3, v_head_dim=3, dtype="float32", page_tokens=4
)


class Pair:
    """A source with three offered pages and a receiver of eight pages."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        self.source = PagePool(LAYOUT, 6 * LAYOUT.page_bytes)
        self.receiver = PagePool(LAYOUT, 8 * LAYOUT.page_bytes)
        self.source_end = MemoryTransport(self.source, network)
        self.transport = MemoryTransport(self.receiver, network)
        self.leases = LeaseTable(self.source, lease_s=60.0)
        self.puller = Puller(self.receiver, self.transport, deadline_s=5.0)
        self.pages = self.source.alloc(3) or []
        for layer, page in itertools.product(range(2), self.pages):
            self.source.keys_PSGD(layer)[page] = 10.0 * layer + page + 1
            self.source.values_PSGC(layer)[page] = -10.0 * layer - page - 1
        self.ticket = self.leases.offer("r", self.pages, 11, self.source_end.address(), now_s=1000.0)

    def start(self, ticket: KvTicket | None = None) -> list[int]:
        pages = self.receiver.alloc(3) or []
        try:
            self.puller.start(ticket or self.ticket, pages, now_s=0.0, unix_s=1001.0)
        except TransferError:
            self.receiver.free(pages)
            raise
        return pages

    def refused(self, now_s: float = 0.0) -> str:
        (arrival,) = self.puller.poll(now_s)
        assert arrival.pages is None
        assert arrival.error is not None
        self.receiver.check_integrity()
        assert self.receiver.num_held == 0
        return str(arrival.error)


class Stuck:
    """A read whose end the test decides."""

    def __init__(self, read) -> None:
        self.now, self.closed, self._read = ReadStatus.PENDING, False, read

    def status(self):
        return self.now

    def epochs(self):
        return self._read.epochs()

    def close(self):
        assert self.now is not ReadStatus.PENDING
        self.closed = True


def test_pages_arrive_bit_for_bit():
    pair = Pair()
    # As Ray carries it between processes.
    pages = pair.start(pickle.loads(pickle.dumps(pair.ticket)))  # noqa: S301
    (arrival,) = pair.puller.poll(0.0)
    assert arrival.pages == pages
    assert (pair.receiver.storage_PB[pages] == pair.source.storage_PB[pair.pages]).all()
    assert pair.source.storage_PB[pair.pages].any()
    pair.receiver.check_integrity()


def test_a_page_reused_before_the_read_is_never_taken():
    pair = Pair()
    pair.leases.release(pair.ticket.ticket_id)
    assert pair.source.alloc(6)
    pair.start()
    assert "re-used" in pair.refused()


def test_a_page_reused_with_the_very_same_bytes_is_never_taken():
    pair = Pair()
    before = pair.source.storage_PB.clone()
    pair.leases.release(pair.ticket.ticket_id)
    assert pair.source.alloc(6)
    pair.source.storage_PB.copy_(before)
    pair.start()
    assert "re-used" in pair.refused()


def test_a_flipped_bit_on_either_side_is_seen():
    for where in ("source", "receiver"):
        pair = Pair()
        if where == "source":
            pair.source.storage_PB[pair.pages[1], 17] ^= 4
        pages = pair.start()
        if where == "receiver":
            pair.receiver.storage_PB[pages[2], 0] ^= 1
        assert "other bytes" in pair.refused()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: replace(t, lease_until_s=1000.5), "lease has expired"),
        (lambda t: replace(t, layout="other"), "another model or KV layout"),
        (lambda t: replace(t, pages=(replace(t.pages[0], page=6), *t.pages[1:])), "no page 6"),
        (lambda t: replace(t, pages=(replace(t.pages[0], page=-1), *t.pages[1:])), "no page -1"),
        (lambda t: replace(t, pages=()), "names no page"),
        (lambda t: replace(t, num_tokens=13), "3 pages for 13 tokens"),
        (lambda t: replace(t, source=replace(t.source, transport="nixl")), "speaks nixl"),
        (lambda t: replace(t, source=replace(t.source, incarnation="gone")), "is gone"),
    ],
)
def test_a_ticket_that_cannot_be_honoured_is_refused_before_a_byte_moves(change, reason):
    pair = Pair()
    with pytest.raises(TransferError, match=reason):
        pair.start(change(pair.ticket))
    pair.receiver.check_integrity()
    assert pair.receiver.num_free == 8


def test_a_source_that_dies_between_data_and_epochs_gives_no_page():
    pair = Pair()
    pair.start()
    pair.source_end.close()
    assert "gone" in pair.refused()


def test_a_late_transfer_fails_at_once_and_its_pages_wait_until_it_is_over():
    pair = Pair()
    stuck = Stuck(None)
    pair.transport.read_pages = lambda *_: stuck  # type: ignore[method-assign]
    pair.start()
    assert pair.puller.poll(4.9) == []
    assert "within 5 s" in pair.refused(now_s=5.0)
    assert (pair.receiver.num_quarantined, pair.receiver.num_free) == (3, 5)
    # The source wakes up and writes into pages nobody owns: no allocation can have got them.
    assert pair.receiver.alloc(6) is None
    assert pair.puller.poll(1e9) == []
    assert pair.receiver.num_quarantined == 3
    stuck.now = ReadStatus.DONE
    assert pair.puller.poll(1e9) == []
    assert stuck.closed
    assert (pair.receiver.num_quarantined, pair.receiver.num_free) == (0, 8)


def test_a_cancelled_transfer_is_quarantined_until_it_is_over():
    pair = Pair()
    stuck = Stuck(None)
    pair.transport.read_pages = lambda *_: stuck  # type: ignore[method-assign]
    pair.start()
    pair.puller.abandon("r")
    assert pair.puller.poll(0.0) == []
    assert pair.receiver.num_quarantined == 3
    stuck.now = ReadStatus.FAILED
    pair.puller.poll(0.0)
    assert pair.receiver.num_free == 8


def test_a_broken_connection_gives_the_pages_back():
    pair = Pair()
    stuck = Stuck(None)
    stuck.now = ReadStatus.FAILED
    pair.transport.read_pages = lambda *_: stuck  # type: ignore[method-assign]
    pair.start()
    assert "broke" in pair.refused()
    assert pair.receiver.num_free == 8


def test_no_order_of_events_commits_pages_that_were_not_verified():
    endings: set[State] = set()
    for events in itertools.product(Event, repeat=5):
        transfer, seen = Transfer(), []
        for event in events:
            try:
                transfer = transfer.after(event)
            except AssertionError:
                break
            seen.append(event)
        if transfer.state is State.COMMITTED:
            assert seen == [Event.STARTED, Event.LANDED, Event.VERIFIED, Event.ADOPTED]
        if transfer.state is State.FAILED and Event.LATE in seen:
            assert Event.OVER in seen
        endings.add(transfer.state)
    assert {State.COMMITTED, State.FAILED, State.QUARANTINED} <= endings


def test_adjacent_pages_are_read_in_one_piece():
    assert adjacent_runs([4, 5, 6, 2, 3], [1, 2, 3, 4, 9]) == [(4, 1, 3), (2, 4, 1), (3, 9, 1)]
    assert adjacent_runs([], []) == []
