"""No reference that is not the one that was given, and no source that wakes too late, ever gives a foreign page."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from tests.support.kv_ends import NUM_PAGES, End, ends

from farspan.kv.ticket import KvTicket

pytest.importorskip("nixl")
COUNT = 24
SOURCE, STRANGER, NEIGHBOUR = 10, 200, 77


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[End, End]]:
    """A source and a receiver in processes of their own, joined over TCP."""
    with ends(2) as (source, receiver):
        yield source, receiver


@pytest.fixture
def joined(pair):
    """Connected, and afterwards nothing is held on either side."""
    source, receiver = pair
    ticket = source.offer("first", 3, 2)
    assert receiver.start(ticket) == ""
    assert receiver.arrive() == [3, 4]
    source.release(ticket.ticket_id)
    yield pair
    settled(receiver)
    settled(source)


def settled(end: End) -> None:
    deadline = time.monotonic() + 30
    while (counts := end.counts()) != (NUM_PAGES, 0, 0):
        assert time.monotonic() < deadline, f"it never settled: {counts}"
        time.sleep(0.01)


def expected(count: int = COUNT) -> list[int]:
    return [SOURCE + place for place in range(count)]


def test_pages_arrive_whole_and_as_they_were_offered_on_the_way_and_at_the_end(joined):
    source, receiver = joined
    for number, count in enumerate((8, 8)):
        assert receiver.follow(source.grow("r", SOURCE, count, COUNT)), number
    ticket = source.offer("r", SOURCE, COUNT)
    # Fetched before: what becomes of the source's copies of them changes nothing.
    assert receiver.start(ticket) == ""
    assert receiver.arrive() == expected()
    assert source.release(ticket.ticket_id)


def released(source: End, ticket: KvTicket) -> KvTicket:
    source.release(ticket.ticket_id)
    source.scribble(STRANGER)
    return ticket


def restored(source: End, ticket: KvTicket) -> KvTicket:
    """Given away and filled with the very same bytes by somebody else."""
    source.release(ticket.ticket_id)
    source.scribble(SOURCE)
    return replace(ticket, pages=ticket.pages[:1], num_tokens=16)


def neighbours(source: End, ticket: KvTicket) -> KvTicket:
    """The places of another prompt, with the epochs these really have."""
    other = source.offer("other", NEIGHBOUR, COUNT)
    source.release(ticket.ticket_id)
    refs = zip(ticket.pages, other.pages, strict=True)
    return replace(other, request_id="r", pages=tuple(replace(theirs, digest=ours.digest) for ours, theirs in refs))


def mixed_up(source: End, ticket: KvTicket) -> KvTicket:
    return replace(ticket, pages=(replace(ticket.pages[0], digest=ticket.pages[1].digest), *ticket.pages[1:]))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (released, "re-used"),
        (restored, "re-used"),
        (neighbours, "other bytes"),
        (mixed_up, "other bytes"),
        (lambda _, t: replace(t, lease_until_s=time.time() - 1), "expired"),
        (lambda _, t: replace(t, pages=(*t.pages[1:], replace(t.pages[0], page=NUM_PAGES))), f"no page {NUM_PAGES}"),
        (lambda _, t: replace(t, pages=(*t.pages[1:], replace(t.pages[0], page=-1))), "no page -1"),
        (lambda _, t: replace(t, source=replace(t.source, num_pages=10**6), pages=far(t)), "could not start|broke"),
        (lambda _, t: replace(t, source=replace(t.source, incarnation="nobody")), "could not start"),
        (lambda _, t: replace(t, source=replace(t.source, metadata=b"nonsense", incarnation="x")), "could not start"),
        (lambda _, t: replace(t, source=replace(t.source, pages_address=4096)), "could not start|broke"),
    ],
    ids=[
        "consumed", "reused with the same bytes", "a neighbour's pages", "another page's digest", "expired",
        "out of range", "negative", "beyond the memory", "an unknown worker", "no worker's address", "a wrong address",
    ],
)  # fmt: skip
def test_an_attack_with_a_stale_or_forged_reference_gives_no_page_and_holds_none(joined, attack: Callable, reason: str):
    source, receiver = joined
    ticket = source.offer("r", SOURCE, COUNT)
    forged = attack(source, ticket)
    problem = receiver.start(forged) or receiver.arrive()
    assert isinstance(problem, str), "pages arrived"
    assert any(part in problem for part in reason.split("|")), problem
    for one in (ticket, forged):
        source.release(one.ticket_id)
    # The next honest one goes well.
    again = source.offer("again", SOURCE, 4)
    assert receiver.start(again) == ""
    assert receiver.arrive() == expected(4)
    source.release(again.ticket_id)


def far(ticket: KvTicket) -> tuple:
    return (*ticket.pages[1:], replace(ticket.pages[0], page=10**6 - 1))


def test_a_consumed_ticket_gives_its_pages_once_more_or_nothing_but_never_anothers(joined):
    source, receiver = joined
    ticket = source.offer("r", SOURCE, COUNT)
    for _ in range(2):
        assert receiver.start(ticket) == ""
        assert receiver.arrive() == expected()
    assert source.release(ticket.ticket_id)
    # Given back, not yet given on: the bytes are still those that were offered.
    assert receiver.start(ticket) == ""
    assert receiver.arrive() == expected()
    source.scribble(STRANGER)
    assert receiver.start(ticket) == ""
    assert "re-used" in receiver.arrive()


@pytest.mark.parametrize("on_the_way", [False, True])
def test_a_frozen_source_that_wakes_when_nobody_waits_any_more_writes_into_no_page_that_is_used(joined, on_the_way):
    source, receiver = joined
    # What earlier tests left there.
    receiver.scribble(0)
    if on_the_way:
        offer = source.grow("r", SOURCE, COUNT, COUNT + 1)
    ticket = source.offer("r", SOURCE, COUNT + 1)
    source.freeze()
    try:
        if on_the_way:
            assert receiver.follow(offer)
        assert receiver.start(ticket) == ""
        assert "no answer within" in receiver.arrive()
        free, held, quarantined = receiver.counts()
        assert (held, free + quarantined) == (0, NUM_PAGES)
        assert quarantined == COUNT + 1
        assert receiver.claim(NEIGHBOUR) == free
        assert receiver.num_landed(SOURCE, COUNT + 1) < COUNT + 1, "it was not frozen"
    finally:
        source.signal(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while receiver.counts()[2]:
        assert time.monotonic() < deadline, "what was quarantined never came back"
    # It did write, when it woke.
    assert receiver.num_landed(SOURCE, COUNT + 1) == COUNT + 1
    assert receiver.unclaim(NEIGHBOUR)
    assert source.release(ticket.ticket_id)


def test_a_source_that_is_killed_fails_its_transfers_and_its_successor_does_not_know_its_tickets():
    with ends(3) as (first, successor, receiver):
        ticket = first.offer("r", SOURCE, COUNT)
        assert receiver.start(ticket) == ""
        assert receiver.arrive() == expected()
        assert receiver.follow(first.grow("next", SOURCE, COUNT, COUNT + 1))
        first.signal(signal.SIGKILL)
        first.process.join(30)
        problem = receiver.start(ticket) or receiver.arrive()
        assert isinstance(problem, str), "a dead process gave pages"
        # Its old references, sent to the process in its place, which has other pages there.
        successor.offer("stranger", STRANGER, COUNT)
        stale = replace(ticket, source=successor.address())
        problem = receiver.start(stale) or receiver.arrive()
        assert isinstance(problem, str)
        assert "other bytes" in problem or "re-used" in problem
        settled(receiver)
