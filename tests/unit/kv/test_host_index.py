"""Every slot of host memory has one state and belongs to those who were given it, whatever order things happen in."""

from __future__ import annotations

import random

import pytest

from farspan.errors import EngineError
from farspan.kv.host_index import Block, Grant, HostIndex, Loan


def block(number: int, before: int | None = None) -> Block:
    return Block(number.to_bytes(32, "big"), (b"root" if before is None else before.to_bytes(32, "big")))


def put(index: HostIndex, number: int, before: int | None = None, client: int = 0) -> Grant:
    (grant,) = index.reserve(client, [block(number, before)])
    assert grant is not None
    assert index.publish(client, [Loan(grant.slot, grant.generation, number)]) == [True]
    return grant


def names(*numbers: int) -> list[bytes]:
    return [block(number).name for number in numbers]


def test_a_block_is_found_only_once_it_is_written():
    index = HostIndex(8)
    (grant,) = index.reserve(1, [block(5)])
    assert index.find(names(5)) == [False]
    assert index.lend(2, names(5)) == [None]
    assert index.reserve(2, [block(5)]) == [None], "somebody writes it already"
    assert index.publish(2, [Loan(grant.slot, grant.generation, 77)]) == [False], "it is not that client's"
    assert index.publish(1, [Loan(grant.slot, grant.generation, 77)]) == [True]
    assert index.lend(2, names(5)) == [Loan(grant.slot, grant.generation, 77)]
    assert index.reserve(2, [block(5)]) == [None], "it is here"
    index.check_integrity()


def test_what_a_dead_writer_was_writing_is_free_again_and_was_never_seen():
    index = HostIndex(8)
    first = put(index, 1, client=1)
    written = index.reserve(1, [block(2), block(3, 2)])
    index.leave(1)
    index.check_integrity()
    assert index.find(names(1, 2, 3)) == [True, False, False]
    assert (index.counts().num_writing, index.counts().abandoned) == (0, 2)
    late = [Loan(grant.slot, grant.generation, 9) for grant in written]
    assert index.publish(1, late) == [False, False], "a message that comes after its sender's death"
    assert index.lend(2, names(1)) == [Loan(first.slot, first.generation, 1)]


def test_a_slot_that_is_read_is_not_given_away_and_a_reader_that_was_too_late_is_told():
    index = HostIndex(2)
    put(index, 1)
    put(index, 2)
    (loan,) = index.lend(7, names(1))
    assert loan is not None
    put(index, 3)
    assert index.find(names(1, 2, 3)) == [True, False, True], "the older one is being read"
    assert index.settle(7, [loan]) == [True]
    assert index.settle(7, [loan]) == [False], "once"
    put(index, 4)
    put(index, 5)
    assert index.find(names(1)) == [False]
    assert index.settle(7, [loan]) == [False], "its slot has another generation"
    assert index.drop([loan]) == [False], "what is there now is not what proved wrong"
    assert index.find(names(4, 5)) == [True, True]
    index.check_integrity()


def test_a_wrong_block_is_found_by_nobody_and_its_slot_is_used_again_when_the_last_reader_is_through():
    index = HostIndex(1)
    put(index, 1)
    (one,) = index.lend(1, names(1))
    (two,) = index.lend(2, names(1))
    assert one is not None
    assert two is not None
    assert index.drop([one, two]) == [True, False]
    assert index.find(names(1)) == [False]
    assert index.reserve(3, [block(1)]) == [None], "no slot is free yet"
    index.check_integrity()
    index.settle(1, [one])
    index.leave(2)
    put(index, 1)
    assert index.counts().corrupt == 1
    index.check_integrity()


def test_of_one_sequence_the_end_is_given_away_before_the_beginning_and_the_oldest_sequence_first():
    index = HostIndex(40)
    for number in range(4):
        put(index, number, number - 1 if number else None)
    for number in range(100, 106):
        # Written one by one, as pages are filled.
        put(index, number, number - 1 if number > 100 else None)
    for number in range(1000, 1030):
        put(index, number)
    gone = []
    for number in range(2000, 2010):
        put(index, number)
        gone += [
            old for old in (*range(4), *range(100, 106)) if not index._ready.get(names(old)[0]) and old not in gone
        ]
        gone = [old for old in gone if names(old)[0] not in index._ready]
    assert gone == [3, 2, 1, 0, 105, 104, 103, 102, 101, 100]


def test_one_client_writes_a_part_of_the_slots_at_most():
    index = HostIndex(16)
    granted = index.reserve(1, [block(number) for number in range(16)])
    assert sum(grant is not None for grant in granted) == 4
    assert all(grant is not None for grant in index.reserve(2, [block(20), block(21)]))


def test_an_index_that_lost_a_slot_says_so():
    index = HostIndex(3)
    index._free.pop()
    with pytest.raises(EngineError, match="lost or doubly owned"):
        index.check_integrity()


def test_ten_thousand_random_steps_leave_no_slot_lost_or_doubly_owned():
    chance = random.Random(11)
    index = HostIndex(12)
    writing: dict[int, list[tuple[Grant, int]]] = {client: [] for client in range(5)}
    reading: dict[int, list[tuple[Loan, int]]] = {client: [] for client in range(5)}
    content: dict[int, int] = {}
    happened = set()
    for _ in range(10_000):
        client, number = chance.randrange(5), chance.randrange(30)
        what = chance.choice(("reserve", "reserve", "write", "lend", "settle", "drop", "abandon", "leave"))
        if what == "reserve":
            (grant,) = index.reserve(client, [block(number, number - 1 if number % 6 else None)])
            if grant is not None:
                held = [loan.slot for loans in reading.values() for loan, _ in loans]
                assert grant.slot not in held + [g.slot for grants in writing.values() for g, _ in grants]
                content.pop(grant.slot, None)
                writing[client].append((grant, number))
        elif what == "lend":
            (loan,) = index.lend(client, names(number))
            assert loan is None or content[loan.slot] == number == loan.digest
            if loan is not None:
                reading[client].append((loan, number))
        elif what == "leave":
            if chance.random() < 0.3:
                index.leave(client)
                writing[client].clear()
                reading[client].clear()
        elif what in ("write", "abandon"):
            if not writing[client]:
                continue
            grant, number = writing[client].pop(chance.randrange(len(writing[client])))
            if what == "write":
                content[grant.slot] = number
                assert index.publish(client, [Loan(grant.slot, grant.generation, number)]) == [True]
            else:
                assert index.abandon(client, [grant]) == [True]
        elif reading[client]:
            loan, number = reading[client][-1]
            assert content[loan.slot] == number, "it was given to somebody else while it was read"
            if what == "drop":
                index.drop([loan])
            else:
                reading[client].pop()
                assert index.settle(client, [loan]) == [True]
        happened.add(what)
        index.check_integrity()
        assert index.counts().num_ready + index.counts().num_writing <= 12
    assert len(happened) == 7
    for client in range(5):
        index.leave(client)
    index.check_integrity()
    counts = index.counts()
    assert counts.num_writing == 0
    assert min(counts.stored, counts.lent, counts.missed, counts.given_away, counts.corrupt, counts.abandoned) > 100
