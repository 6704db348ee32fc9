"""One process's connection to the agent that owns its host's blocks."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from farspan.errors import TierError
from farspan.kv.host_cache import HostCache
from farspan.kv.host_index import Block, Grant, HostCounts, Loan
from farspan.kv.host_wire import (
    ANSWERED,
    ASKED,
    HEADER,
    HELLO,
    MAGIC,
    MOST_RECORDS,
    Op,
    Records,
    counts_of,
    grant_of,
    is_ours,
    loan_of,
    pack,
    unpack,
)
from farspan.memory.shared import SharedTier

# An agent answers in microseconds. One that is frozen must not keep anybody.
TIMEOUT_S = 2.0
_NAME = "host cache"


def join_host_cache(address: str, block_bytes: int, timeout_s: float = TIMEOUT_S) -> HostCache:
    """The cache of the agent that listens at `address`.

    Raises:
        TierError: nobody of the same user answers in time, or its slots have another size.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(timeout_s)
    try:
        peer.connect("\0" + address)
        if not is_ours(peer):
            raise TierError(_NAME, "the agent belongs to another user")
        tier = _hello(peer, block_bytes)
    except OSError as problem:
        peer.close()
        raise TierError(_NAME, f"the agent does not answer: {problem}") from None
    except TierError:
        peer.close()
        raise
    return HostCache(AgentArbiter(peer), tier)


def _hello(peer: socket.socket, block_bytes: int) -> SharedTier:
    hello, files, _, _ = socket.recv_fds(peer, HELLO.size, 1)
    if len(hello) != HELLO.size or len(files) != 1:
        raise TierError(_NAME, "the agent speaks another language; start it anew")
    magic, num_slots, slot_bytes = HELLO.unpack(hello)
    # Closes the file when it does not fit.
    tier = SharedTier(files[0], num_slots, slot_bytes)
    if magic != MAGIC or slot_bytes != block_bytes:
        tier.close()
        raise TierError(_NAME, f"the agent has slots of {slot_bytes} bytes, not of {block_bytes}")
    return tier


class AgentArbiter:
    """`Arbiter` over a connection; for one thread at a time. Once a call failed, every later one fails."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def find(self, names: Sequence[bytes]) -> list[bool]:
        return [found for (found,) in self._ask(Op.FIND, [(name,) for name in names])]

    def lend(self, names: Sequence[bytes]) -> list[Loan | None]:
        return [loan_of(values) for values in self._ask(Op.LEND, [(name,) for name in names])]

    def settle(self, grants: Sequence[Grant]) -> list[bool]:
        return self._told(Op.SETTLE, grants)

    def reserve(self, blocks: Sequence[Block]) -> list[Grant | None]:
        asked = [(block.name, block.before) for block in blocks]
        return [grant_of(values) for values in self._ask(Op.RESERVE, asked)]

    def publish(self, loans: Sequence[Loan]) -> list[bool]:
        asked = [(loan.slot, loan.generation, loan.digest) for loan in loans]
        return [told for (told,) in self._ask(Op.PUBLISH, asked)]

    def abandon(self, grants: Sequence[Grant]) -> list[bool]:
        return self._told(Op.ABANDON, grants)

    def drop(self, grants: Sequence[Grant]) -> list[bool]:
        return self._told(Op.DROP, grants)

    def counts(self) -> HostCounts:
        return counts_of(self._ask(Op.COUNTS, [(True,)])[0])

    def close(self) -> None:
        self._peer.close()

    def _told(self, op: Op, grants: Sequence[Grant]) -> list[bool]:
        return [told for (told,) in self._ask(op, [(grant.slot, grant.generation) for grant in grants])]

    def _ask(self, op: Op, records: Sequence[tuple[Any, ...]]) -> Records:
        answers: Records = []
        for start in range(0, len(records), MOST_RECORDS):
            some = records[start : start + MOST_RECORDS]
            told = self._exchange(op, pack(ASKED[op], some))
            if len(told) != len(some):
                raise self._lost(f"{len(told)} answers to {len(some)} questions")
            answers += told
        return answers

    def _exchange(self, op: Op, payload: bytes) -> Records:
        try:
            self._peer.sendall(HEADER.pack(op, len(payload)) + payload)
            answered, size = HEADER.unpack(self._read(HEADER.size))
            if answered != op:
                raise ValueError(f"an answer to {answered} instead of {int(op)}")
            return unpack(ANSWERED[op], self._read(size))
        except (OSError, ValueError) as problem:
            raise self._lost(str(problem) or type(problem).__name__) from None

    def _read(self, size: int) -> bytes:
        arrived = bytearray()
        while len(arrived) < size:
            piece = self._peer.recv(size - len(arrived))
            if not piece:
                raise ConnectionError("it closed the connection")
            arrived += piece
        return bytes(arrived)

    def _lost(self, reason: str) -> TierError:
        # A late answer to this question must not be taken for one to the next. And what this process holds is given
        # back by the agent: nothing is read or written after this.
        with suppress(OSError):
            self._peer.close()
        return TierError(_NAME, f"the agent is lost: {reason}")
