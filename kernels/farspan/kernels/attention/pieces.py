"""Cut the band of visible (query, key) pairs into rectangles and triangles that fused kernels compute without a mask.

Coordinates: query t of the pair stands at p = t + offset and sees keys s with p - window < s <= p. A band of width
`window` is a chain of equal blocks along the diagonal, so the pieces are few whatever the length:

    block of queries     keys behind the block               keys beside the block
    a .. a + window      upper triangle (the far edge)       lower triangle (the diagonal)

An upper triangle is a lower one with the order of its queries and of its keys reversed. Pure code on plain integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    FULL = "full"
    """Every query sees every key."""
    CAUSAL = "causal"
    """Query i sees keys 0..i of the piece; there are at most as many keys as queries."""
    FLIPPED = "flipped"
    """Query i sees keys i.. of the piece; there are as many keys as queries."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`repeat` equal pieces; each begins `step` queries and keys after the one before it."""

    kind: Kind
    query: int
    num_queries: int
    key: int
    num_keys: int
    repeat: int = 1
    step: int = 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every visible (query, key), written out: what tests count, and nothing else calls."""
        for start in range(0, self.repeat * self.step or 1, self.step or 1):
            for i in range(self.num_queries):
                first = i if self.kind is Kind.FLIPPED else 0
                last = min(i + 1, self.num_keys) if self.kind is Kind.CAUSAL else self.num_keys
                for j in range(first, last):
                    yield self.query + start + i, self.key + start + j


def cut_band(num_queries: int, num_keys: int, offset: int | None, window: int | None) -> list[Piece]:
    """Pieces that hold every visible (query, key) pair exactly once; at most a dozen, whatever the lengths.

    No piece holds a query that sees none of its keys, so a softmax over one of its rows is never empty.
    """
    if num_queries == 0 or num_keys == 0:
        return []
    if offset is None:
        return [Piece(Kind.FULL, 0, num_queries, 0, num_keys)]
    first, last = max(offset, 0), num_queries + offset
    # A window that reaches back to key 0 from the last query hides nothing.
    reach = last + 1 if window is None else min(window, last + 1)
    last = min(last, num_keys + reach - 1)
    pieces: list[Piece] = []
    start = first
    while start < last:
        length = min(reach, last - start)
        # Blocks whose whole window exists are all alike: they become one batch.
        alike = min((last - start) // reach, (num_keys - start) // reach) if start >= reach - 1 else 1
        repeat = max(alike, 1)
        pieces += _cut_block(start, length, num_keys, reach, offset, repeat)
        start += length * repeat
    return _joined(pieces)


def _cut_block(start: int, length: int, num_keys: int, reach: int, offset: int, repeat: int) -> Iterator[Piece]:
    """Pieces of queries at positions start .. start + length, repeated at steps of `length`; length <= reach."""
    query, step = start - offset, length if repeat > 1 else 0
    beside = min(length, num_keys - start)
    if beside > 0:
        yield Piece(Kind.CAUSAL, query, length, start, beside, repeat, step)
    # Keys behind the block: query i sees those from `far + i` on. Keys before 0 do not exist.
    far, near = start - reach + 1, min(start, num_keys)
    whole = min(max(-far, 0), length)
    if whole > 0 and near > 0:
        yield Piece(Kind.FULL, query, whole, 0, near, repeat, step)
    edge = min(length - whole, near - far - whole)
    if edge <= 0:
        return
    yield Piece(Kind.FLIPPED, query + whole, edge, far + whole, edge, repeat, step)
    if far + whole + edge < near:
        rest = length - whole
        yield Piece(Kind.FULL, query + whole, rest, far + whole + edge, near - far - whole - edge, repeat, step)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring batches of equal diagonals as one: a first block without a past has the diagonal of the others."""
    joined: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.kind.value, p.num_queries, p.num_keys, p.query)):
        if joined and (both := _chained(joined[-1], piece)):
            joined[-1] = both
        else:
            joined.append(piece)
    return joined


def _chained(a: Piece, b: Piece) -> Piece | None:
    step = a.step or b.step or b.query - a.query
    fits = (
        (a.kind, a.num_queries, a.num_keys) == (b.kind, b.num_queries, b.num_keys)
        and b.query - a.query == b.key - a.key == a.repeat * step
        and a.step in (0, step)
        and b.step in (0, step)
        and step >= a.num_queries
    )
    return Piece(a.kind, a.query, a.num_queries, a.key, a.num_keys, a.repeat + b.repeat, step) if fits else None
