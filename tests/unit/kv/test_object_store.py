"""Pages that travel as objects of a store: what comes in time is taken, what does not leaves nothing behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.unit.kv.store import Store

from farspan.errors import ConfigError, TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.puller import Puller
from farspan.kv.ticket import KvTicket, LeaseTable
from farspan.kv.transports import nixl
from farspan.kv.transports.base import ReadStatus
from farspan.kv.transports.choose import choose_transport
from farspan.kv.transports.memory import MemoryNetwork, MemoryTransport
from farspan.kv.transports.object_store import ObjectTransport

LAYOUT = KvLayout.uniform(
    model="m", num_layers=2, num_kv_heads=1, k_head_dim=3, v_head_dim=3, dtype="float32", page_tokens=4
)
DEADLINE_S = 5.0


class Pair:
    """A source with three offered pages, and a receiver of eight, joined by a store."""

    def __init__(self) -> None:
        self.store, self.now_s = Store(), 0.0
        self.source, self.receiver = (PagePool(LAYOUT, count * LAYOUT.page_bytes) for count in (6, 8))
        self.source_end, self.receiver_end = (
            ObjectTransport(pool, self.store.open, DEADLINE_S, lambda: self.now_s)
            for pool in (self.source, self.receiver)
        )
        self.leases = LeaseTable(self.source, lease_s=60.0)
        self.puller = Puller(self.receiver, self.receiver_end, DEADLINE_S)
        self.pages = self.source.alloc(3) or []
        self.source.storage_PB[self.pages] = torch.arange(3 * LAYOUT.page_bytes).reshape(3, -1).to(torch.uint8)
        self.ticket = self.leases.offer("r", self.pages, 11, self.source_end.address(), now_s=1000.0)

    def start(self, ticket: KvTicket | None = None) -> list[int]:
        pages = self.receiver.alloc(3) or []
        # Somebody looks at the clock before the read is posted.
        self.puller.start(ticket or self.ticket, pages, self.now_s - 0.2, unix_s=1001.0)
        return pages

    def refused(self) -> str:
        (arrival,) = self.puller.poll(self.now_s)
        assert arrival.pages is None
        self.receiver.check_integrity()
        assert self.receiver.num_held == 0
        return str(arrival.error)


def test_pages_arrive_bit_for_bit_and_nothing_keeps_their_bytes():
    pair = Pair()
    pages = pair.start()
    assert not pair.receiver.storage_PB[pages].any(), "only a look of the pool's own thread writes pages"
    (arrival,) = pair.puller.poll(0.0)
    assert arrival.pages == pages
    assert (pair.receiver.storage_PB[pages] == pair.source.storage_PB[pair.pages]).all()
    assert (len(pair.store.objects), pair.store.num_held) == (2, 0)


def test_a_late_answer_changes_no_page_and_its_pages_are_free_after_its_deadline():
    pair = Pair()
    pair.store.held = True
    pages = pair.start()
    assert pair.puller.poll(DEADLINE_S - 0.3) == []
    pair.now_s = DEADLINE_S - 0.1
    assert "within 5 s" in pair.refused()
    assert (pair.receiver.num_quarantined, pair.receiver.num_free) == (3, 5)
    pair.now_s = DEADLINE_S
    pair.puller.poll(pair.now_s)
    assert (pair.receiver.num_quarantined, pair.receiver.num_free) == (0, 8)
    reused = pair.receiver.alloc(8) or []
    assert set(pages) <= set(reused)
    before = pair.receiver.storage_PB.clone()
    pair.store.release()
    pair.puller.poll(pair.now_s)
    assert (pair.receiver.storage_PB == before).all()
    assert (len(pair.store.objects), pair.store.num_put, pair.store.num_held) == (1, 0, 0)


def test_a_cancelled_request_waits_for_its_answer_in_quarantine_and_at_most_until_the_deadline():
    for comes in (True, False):
        pair = Pair()
        pair.store.held = True
        pages = pair.start()
        pair.puller.abandon("r")
        assert pair.puller.poll(0.0) == []
        assert pair.receiver.num_quarantined == 3
        others = pair.receiver.alloc(5) or []
        assert not set(pages) & set(others)
        if comes:
            pair.store.release()
        else:
            pair.now_s = DEADLINE_S
        assert pair.puller.poll(pair.now_s) == []
        assert (pair.receiver.num_quarantined, pair.receiver.num_free) == (0, 3)
        assert not pair.receiver.storage_PB[others].any()


def test_a_page_reused_while_the_answer_was_on_its_way_is_never_taken():
    pair = Pair()
    pair.start()
    # The data is in the store; the page is somebody else's before its epoch is asked for.
    pair.leases.release(pair.ticket.ticket_id)
    assert pair.source.alloc(6)
    assert "re-used" in pair.refused()


def test_a_bit_that_flipped_at_the_source_is_seen():
    pair = Pair()
    pair.source.storage_PB[pair.pages[1], 17] ^= 4
    pair.start()
    assert "other bytes" in pair.refused()


def test_a_source_that_has_gone_or_answers_something_else_breaks_the_transfer_alone():
    for harm in ("gone", "short", "no bytes"):
        pair = Pair()
        if harm == "gone":
            pair.source_end.close()
        else:
            answer: Any = b"short" if harm == "short" else ["no", "bytes"]
            pair.store.sources[pair.ticket.source.incarnation].copy_pages = lambda _, told=answer: told  # type: ignore[method-assign]
        pair.start()
        assert "broke" in pair.refused()
        assert pair.receiver.num_free == 8


def test_a_source_refuses_pages_it_does_not_have():
    pair = Pair()
    for page in (-1, 6):
        for read in (
            pair.receiver_end.read_pages(pair.source_end.address(), [page], [0]),
            pair.receiver_end.read_epochs(pair.source_end.address(), [page]),
        ):
            assert read.status() is ReadStatus.FAILED
            read.close()


def test_a_ticket_of_another_transport_is_refused_in_one_sentence_before_a_byte_moves():
    pair = Pair()
    other = MemoryTransport(pair.source, MemoryNetwork())
    ticket = pair.leases.offer("r", pair.pages, 11, other.address(), now_s=1000.0)
    with pytest.raises(TransferError, match=r"the source speaks memory, not object_store; set transfer\.transport"):
        pair.start(ticket)
    assert pair.store.objects == []


def opened() -> MemoryTransport:
    return MemoryTransport(PagePool(LAYOUT, 6 * LAYOUT.page_bytes), MemoryNetwork())


def test_auto_takes_the_object_store_where_nixl_is_missing_or_cannot_start_and_says_why(monkeypatch):
    pool = PagePool(LAYOUT, 6 * LAYOUT.page_bytes)

    def broken(name: str) -> Any:
        raise TransferError(name, "NIXL is not installed")

    monkeypatch.setattr(nixl, "make_agent", broken)
    chosen = choose_transport("auto", pool, opened)
    assert (chosen.transport.name, chosen.reason) == ("memory", "NIXL is not installed")
    with pytest.raises(TransferError, match="NIXL is not installed"):
        choose_transport("nixl", pool, opened)
    asked_for = choose_transport("object_store", pool, opened)
    assert (asked_for.transport.name, asked_for.reason) == ("memory", "transfer.transport asks for it")
    with pytest.raises(ConfigError, match="auto, nixl or object_store"):
        choose_transport("carrier pigeon", pool, opened)


def test_a_package_that_is_not_there_is_a_reason_not_an_error(monkeypatch):
    # What Python does with a package that is not installed.
    monkeypatch.setitem(sys.modules, "nixl", None)
    chosen = choose_transport("auto", PagePool(LAYOUT, 6 * LAYOUT.page_bytes), opened)
    assert chosen.transport.name == "memory"
    assert chosen.reason.startswith("NIXL is not installed (")
