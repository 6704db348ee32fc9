"""Clients of one agent share its memory, whatever they send, and however many of them there are."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from farspan.errors import TierError
from farspan.kv.host_agent import HostAgent
from farspan.kv.host_cache import HostCache, Source
from farspan.kv.host_client import AgentArbiter, join_host_cache
from farspan.kv.host_index import Block, Grant, Loan
from farspan.kv.host_wire import HEADER, HELLO, Op
from farspan.memory.shared import SharedTier

BLOCK_BYTES = 512
NUM_SLOTS = 24


@pytest.fixture
def agent() -> Iterator[HostAgent]:
    made = HostAgent(NUM_SLOTS * BLOCK_BYTES + 100, BLOCK_BYTES)
    thread = threading.Thread(target=made.run, args=(60.0,))
    thread.start()
    yield made
    made.check_integrity()
    made.stop()
    thread.join(30)
    assert not thread.is_alive()


def join(agent: HostAgent) -> HostCache:
    return join_host_cache(agent.address, BLOCK_BYTES)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content_of(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (BLOCK_BYTES,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def source(number: int, unchanged: bool = True) -> Source:
    return Source(Block(name(number), name(number - 1)), content_of(number), lambda: unchanged)


def fetched(cache: HostCache, *numbers: int) -> list[torch.Tensor | None]:
    targets = [torch.zeros(BLOCK_BYTES, dtype=torch.uint8) for _ in numbers]
    arrived = cache.fetch([name(number) for number in numbers], targets)
    return [target if here else None for target, here in zip(targets, arrived, strict=True)]


def raw(agent: HostAgent) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(30)
    peer.connect("\0" + agent.address)
    hello, files, _, _ = socket.recv_fds(peer, HELLO.size, 1)
    assert HELLO.unpack(hello)[1:] == (NUM_SLOTS, BLOCK_BYTES)
    for file in files:
        os.close(file)
    return peer


def test_what_one_client_keeps_another_reads_also_after_the_first_has_left(agent):
    first, second = join(agent), join(agent)
    assert first.store([source(number) for number in range(1, 6)]) == 5
    assert second.store([source(number) for number in range(3, 8)]) == 2
    first.close()
    found = fetched(second, *range(1, 9))
    assert found[7] is None
    for number, content_B in enumerate(found[:7], 1):
        assert content_B is not None
        assert torch.equal(content_B, content_of(number))
    second.close()


def test_a_page_that_was_given_away_while_it_was_copied_is_not_kept(agent):
    cache = join(agent)
    assert cache.store([source(1), source(2, unchanged=False), source(3)]) == 2
    assert cache.find([name(1), name(2), name(3)]) == [True, False, True]
    assert cache.counts().abandoned == 1
    cache.close()


def test_a_flipped_bit_is_noticed_by_the_next_reader_and_nobody_reads_the_block_again(agent):
    first, second = join(agent), join(agent)
    chance = random.Random(2)
    for number in range(1, 9):
        first.store([source(number)])
        (loan,) = second._arbiter.lend([name(number)])
        second._arbiter.settle([loan])
        # Any process may do that to memory it shares.
        second._tier._memory_SB[loan.slot, chance.randrange(BLOCK_BYTES)] ^= 1 << chance.randrange(8)
        assert fetched(first, number) == [None]
        assert first.find([name(number)]) == [False]
        assert first.counts().corrupt == number
        assert first.store([source(number)]) == 1
        assert torch.equal(fetched(second, number)[0], content_of(number))
    first.close()
    second.close()


def test_four_clients_in_four_threads_never_read_what_is_not_the_block_and_never_hold_more_than_there_is(agent):
    wrong: list[int] = []
    arrived = [0] * 4
    most = [0] * 4

    def work(number: int) -> None:
        chance = random.Random(number)
        cache = join(agent)
        for turn in range(150):
            asked = [chance.randrange(1, 60) for _ in range(chance.randint(1, 6))]
            if chance.random() < 0.5:
                cache.store([source(each, chance.random() < 0.9) for each in dict.fromkeys(asked)])
            else:
                for each, content_B in zip(asked, fetched(cache, *asked), strict=True):
                    if content_B is not None:
                        arrived[number] += 1
                        wrong.extend([] if torch.equal(content_B, content_of(each)) else [each])
            if turn % 40 == 39:
                counts = cache.counts()
                most[number] = max(most[number], counts.num_ready + counts.num_writing)
                cache.close()
                cache = join(agent)
        cache.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert min(arrived) > 20
    assert max(most) <= NUM_SLOTS
    assert agent.counts().corrupt == 0


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(99, 0),
        HEADER.pack(Op.FIND, 31) + b"x" * 31,
        HEADER.pack(Op.LEND, 2**31),
        b"\xff" * 64,
    ],
)
def test_whoever_sends_what_is_no_frame_is_left_alone_and_the_others_are_served(agent, sent):
    peer, cache = raw(agent), join(agent)
    cache.store([source(1)])
    peer.sendall(sent)
    assert peer.recv(1) == b"", "the agent hangs up"
    peer.close()
    assert torch.equal(fetched(cache, 1)[0], content_of(1))
    cache.close()


def test_a_client_that_reads_no_answers_keeps_nobody_waiting(agent):
    peer, cache = raw(agent), join(agent)
    peer.setblocking(False)
    asked = memoryview((HEADER.pack(Op.FIND, 32 * 4096) + name(1) * 4096) * 200)
    with suppress(BlockingIOError):
        while asked:
            # As much as goes in, so that each question begins where the one before ended.
            asked = asked[peer.send(asked) :]
    assert asked, "its answers wait, so its questions do"
    assert cache.store([source(1)]) == 1
    assert torch.equal(fetched(cache, 1)[0], content_of(1))
    peer.close()
    cache.close()


def test_slots_and_generations_that_nobody_gave_are_refused(agent):
    peer, cache = raw(agent), join(agent)
    cache.store([source(1)])
    (loan,) = cache._arbiter.lend([name(1)])
    cache._arbiter.settle([loan])
    stranger = AgentArbiter(peer)
    made_up = [Grant(loan.slot, loan.generation), Grant(2**31, 1), Grant(0, 2**40)]
    assert stranger.settle(made_up) == [False] * 3
    assert stranger.abandon(made_up) == [False] * 3
    assert stranger.publish([Loan(grant.slot, grant.generation, 5) for grant in made_up]) == [False] * 3
    assert stranger.drop(made_up[1:]) == [False] * 2
    assert torch.equal(fetched(cache, 1)[0], content_of(1))
    stranger.close()
    cache.close()


def test_an_agent_whose_clients_are_gone_ends_by_itself():
    made = HostAgent(4 * BLOCK_BYTES, BLOCK_BYTES)
    cache: list[HostCache] = []
    thread = threading.Thread(target=made.run, args=(0.5,))
    thread.start()
    cache.append(join(made))
    thread.join(2.0)
    assert thread.is_alive(), "somebody is connected"
    cache[0].close()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(TierError):
        join(made)


def test_memory_of_a_size_that_can_change_is_not_mapped():
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 1024)
    with pytest.raises(TierError, match="not a sealed file of 1024 bytes"):
        SharedTier(file, 2, 512)
    made = SharedTier.create(1024, 512)
    with pytest.raises(PermissionError):
        os.ftruncate(made.file, 512)
    with pytest.raises(TierError, match="hold not one slot"):
        SharedTier.create(100, 512)
    made.close()


def test_a_copy_that_fails_leaves_no_slot_reserved_or_lent():
    class Broken(HostCache):
        broken = False

        def _copy(self, grants, contents, *, back):
            if self.broken:
                raise RuntimeError("the copy failed")
            super()._copy(grants, contents, back=back)

    cache = Broken.alone(8 * BLOCK_BYTES, BLOCK_BYTES)
    assert cache.store([source(1)]) == 1
    for _ in range(20):
        cache.broken = True
        with pytest.raises(RuntimeError):
            cache.store([source(2), source(3)])
        with pytest.raises(RuntimeError):
            fetched(cache, 1)
        cache.broken = False
        cache._arbiter._index.check_integrity()
        assert cache.counts().num_writing == 0
    assert cache.store([source(number) for number in range(2, 4)]) == 2
    for number in range(4, 20):
        cache.store([source(number)])
    assert cache.find([name(1)]) == [False], "nobody reads it any more: it made room"
    cache.close()


def test_a_long_prompt_is_kept_whole_where_there_are_few_slots():
    cache = HostCache.alone(12 * BLOCK_BYTES, BLOCK_BYTES)
    assert cache.store([source(number) for number in range(1, 13)]) == 12
    assert all(found is not None for found in fetched(cache, *range(1, 13)))
    cache.close()
