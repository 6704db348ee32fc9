"""What an agent and its clients say to each other: frames of fixed records, nothing that needs parsing.

A frame is its operation, the number of bytes that follow, and records. A client asks, then waits for the answer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import astuple
from enum import IntEnum
from struct import Struct, calcsize
from typing import Any

from farspan.kv.host_cache import Arbiter
from farspan.kv.host_index import Block, Grant, HostCounts, Loan

# Records that travel in one frame; more are asked for in several.
MOST_RECORDS = 4096
HELLO = Struct("<8sIQ")
"""Magic, number of slots, bytes of a slot; a descriptor of the memory comes with it."""
MAGIC = b"farspan1"
HEADER = Struct("<BI")

_NAME, _BLOCK, _GRANT, _LOAN, _BOOL, _COUNTS = (
    Struct(f"<{form}") for form in ("32s", "32s32s", "IQ", "IQQ", "?", "9Q")
)
# Stands for "none" in an answer: no index has so many slots.
_NOBODY = 2**32 - 1


class Op(IntEnum):
    FIND = 1
    LEND = 2
    SETTLE = 3
    RESERVE = 4
    PUBLISH = 5
    ABANDON = 6
    DROP = 7
    COUNTS = 8


ASKED = {
    Op.FIND: _NAME,
    Op.LEND: _NAME,
    Op.SETTLE: _GRANT,
    Op.RESERVE: _BLOCK,
    Op.PUBLISH: _LOAN,
    Op.ABANDON: _GRANT,
    Op.DROP: _GRANT,
    Op.COUNTS: _BOOL,
}
ANSWERED = {
    Op.FIND: _BOOL,
    Op.LEND: _LOAN,
    Op.SETTLE: _BOOL,
    Op.RESERVE: _GRANT,
    Op.PUBLISH: _BOOL,
    Op.ABANDON: _BOOL,
    Op.DROP: _BOOL,
    Op.COUNTS: _COUNTS,
}
MOST_BYTES = MOST_RECORDS * max(record.size for record in (*ASKED.values(), *ANSWERED.values()))

Records = list[tuple[Any, ...]]


def pack(record: Struct, records: Sequence[tuple[Any, ...]]) -> bytes:
    return b"".join(record.pack(*values) for values in records)


def unpack(record: Struct, payload: bytes) -> Records:
    """Raises ValueError when the bytes are not whole records."""
    if len(payload) % record.size:
        raise ValueError(f"{len(payload)} bytes are not records of {record.size}")
    return list(record.iter_unpack(payload))


def carry_out(seat: Arbiter, op: Op, records: Records) -> Records:
    """What an arbiter says to a frame."""
    match op:
        case Op.FIND:
            return [(found,) for found in seat.find([name for (name,) in records])]
        case Op.LEND:
            return [_as_loan(loan) for loan in seat.lend([name for (name,) in records])]
        case Op.SETTLE:
            return [(told,) for told in seat.settle([Grant(*values) for values in records])]
        case Op.RESERVE:
            grants = seat.reserve([Block(*values) for values in records])
            return [(_NOBODY, 0) if grant is None else (grant.slot, grant.generation) for grant in grants]
        case Op.PUBLISH:
            return [(told,) for told in seat.publish([Loan(*values) for values in records])]
        case Op.ABANDON:
            return [(told,) for told in seat.abandon([Grant(*values) for values in records])]
        case Op.DROP:
            return [(told,) for told in seat.drop([Grant(*values) for values in records])]
        case Op.COUNTS:
            return [astuple(seat.counts())]


def grant_of(values: tuple[Any, ...]) -> Grant | None:
    return None if values[0] == _NOBODY else Grant(*values)


def loan_of(values: tuple[Any, ...]) -> Loan | None:
    return None if values[0] == _NOBODY else Loan(*values)


def counts_of(values: tuple[Any, ...]) -> HostCounts:
    return HostCounts(*values)


def peer_user(peer: socket.socket) -> int:
    """The user that the process at the other end belongs to, as the kernel knows it."""
    form = "3i"
    _, user, _ = Struct(form).unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, calcsize(form)))
    return int(user)


def is_ours(peer: socket.socket) -> bool:
    """Whether the other end is a process of the same user."""
    return peer_user(peer) == os.getuid()


def _as_loan(loan: Loan | None) -> tuple[int, int, int]:
    return (_NOBODY, 0, 0) if loan is None else (loan.slot, loan.generation, loan.digest)
