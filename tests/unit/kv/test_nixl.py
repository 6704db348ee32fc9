"""What a read over NIXL holds is given back, however it ends, and a peer that broke is forgotten."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from farspan.errors import TransferError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.transports import nixl
from farspan.kv.transports.base import ReadStatus
from farspan.kv.transports.nixl import NixlTransport, _Peers

LAYOUT = KvLayout.uniform(
    model="m", num_layers=2, num_kv_heads=1, k_head_dim=3, v_head_dim=3, dtype="float32", page_tokens=4
)


class Counted:
    """A real agent that counts what it holds."""

    def __init__(self, agent) -> None:
        self._agent, self.registered, self.peers = agent, 0, []

    def __getattr__(self, name):
        return getattr(self._agent, name)

    def register_memory(self, *given):
        held = self._agent.register_memory(*given)
        self.registered += 1
        return held

    def deregister_memory(self, held):
        self._agent.deregister_memory(held)
        self.registered -= 1

    def add_remote_agent(self, metadata):
        name = self._agent.add_remote_agent(metadata)
        self.peers.append(name)
        return name

    def remove_remote_agent(self, name):
        self.peers = [peer for peer in self.peers if peer not in (name, name.encode())]
        return self._agent.remove_remote_agent(name)


@pytest.fixture
def ends():
    source, receiver = (NixlTransport(PagePool(LAYOUT, 6 * LAYOUT.page_bytes)) for _ in range(2))
    counted = Counted(receiver._agent)
    receiver._agent = receiver._peers._agent = receiver._buffers._agent = counted
    yield source, receiver, counted
    receiver.close()
    source.close()


def finished(read) -> ReadStatus:
    deadline = time.monotonic() + 30
    while (status := read.status()) is ReadStatus.PENDING:
        assert time.monotonic() < deadline, "the read did not end"
    return status


def test_two_ends_between_which_nothing_travels_take_no_processor(ends):
    source, receiver, _ = ends
    before, began = time.process_time(), time.monotonic()
    time.sleep(0.5)
    used, passed = time.process_time() - before, time.monotonic() - began
    assert used < 0.2 * passed, "NIXL's own threads spin: each takes a core"
    read = receiver.read_epochs(source.address(), [0])
    assert finished(read) is ReadStatus.DONE
    read.close()


def test_a_read_that_cannot_start_gives_everything_back_and_the_next_one_works(ends):
    source, receiver, counted = ends
    wrong = replace(source.address(), epochs_address=4096)
    for _ in range(3):
        with pytest.raises(TransferError, match="could not start"):
            receiver.read_epochs(wrong, [0, 1])
    # Memory for epochs is kept, and used again.
    assert (counted.registered, counted.peers) == (1, [])
    read = receiver.read_epochs(source.address(), [0, 1])
    assert finished(read) is ReadStatus.DONE
    assert read.epochs() == source._pool.epochs_P[:2].tolist()
    read.close()
    assert (counted.registered, len(counted.peers)) == (1, 1)


class Names:
    """An agent that only knows names."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def add_remote_agent(self, metadata):
        self.known.append(metadata.decode())

    def remove_remote_agent(self, name):
        self.known.remove(name)


def test_epochs_are_read_into_memory_that_was_registered_once_and_two_reads_never_share_it(ends):
    source, receiver, counted = ends
    source._pool.epochs_P.copy_(torch.arange(6))
    for page in range(3):
        read = receiver.read_epochs(source.address(), [page])
        assert finished(read) is ReadStatus.DONE
        assert read.epochs() == [page]
        read.close()
    assert counted.registered == 1
    under_way = [receiver.read_epochs(source.address(), [page]) for page in (4, 5)]
    assert [finished(read) for read in under_way] == [ReadStatus.DONE] * 2
    assert [read.epochs() for read in under_way] == [[4], [5]]
    assert counted.registered == 2
    for read in under_way:
        read.close()
    receiver._buffers.forget_free()
    assert counted.registered == 0


def met(peers: _Peers, ends, name: str):
    return peers.meet(replace(ends[0].address(), incarnation=name, metadata=name.encode()))


def test_a_lost_peer_is_forgotten_when_its_last_read_is_over_and_met_again_afterwards(ends):
    agent = Names()
    peers = _Peers(agent)
    first, second = met(peers, ends, "a"), met(peers, ends, "a")
    peers.lose("a")
    peers.leave(first)
    # The other read may still write here: it must not lose its connection under way.
    assert agent.known == ["a"]
    peers.leave(second)
    assert agent.known == []
    met(peers, ends, "a")
    assert agent.known == ["a"]


def test_peers_nobody_reads_from_any_more_do_not_pile_up(ends, monkeypatch):
    monkeypatch.setattr(nixl, "_MOST_PEERS", 3)
    agent = Names()
    peers = _Peers(agent)
    busy = met(peers, ends, "busy")
    for number in range(10):
        peers.leave(met(peers, ends, f"p{number}"))
    assert agent.known == ["busy", "p8", "p9"]
    peers.leave(busy)
