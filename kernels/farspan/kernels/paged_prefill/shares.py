"""Which queries of a batch of prompts one thread computes together, as plain numbers.

A share lays out keys and values for all its rows, a row for each head of a query: the more rows, the less of that. But
threads must have enough shares. Short segments that begin with the same pages are one share, which lays those out once.
None of this changes a bit of any result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]

# Rows of a pass of the kernel; rows of a share, and the fewest where threads would be without work.
PASS_ROWS, MOST_ROWS, LEAST_ROWS = 16, 1536, 64
# What their queries and outputs may take, to stay in the second cache.
_MOST_BYTES = 640 * 1024
# A thread that is held up by another process leaves its later shares to the others.
_SHARES_PER_THREAD = 6
# Slots that segments have to have in common to be one share.
_LEAST_COMMON = 256


@dataclass(frozen=True, slots=True)
class Shares:
    """Queries begin..begin+count of a segment are a piece; share i is pieces share_pieces[i] .. share_pieces[i + 1]."""

    piece_segment: Numbers
    piece_begin: Numbers
    piece_count: Numbers
    share_pieces: Numbers
    share_common: Numbers
    """Slots from 0 on that all pieces of a share find in the same pages, and see."""
    passes: int
    """Of the largest share."""

    def __len__(self) -> int:
        return len(self.share_common)


@dataclass(frozen=True, slots=True)
class _Share:
    pieces: list[tuple[int, int, int]]
    common: int
    cost: float


def cut_shares(
    lengths: Numbers, pasts: Numbers, lows: Numbers, tables: Numbers, *, heads: int, groups: int, slots: int,
    window: int | None, threads: int, row_bytes: int = 0,
) -> Shares:  # fmt: skip
    """`heads`: query heads of a group; every share is computed once for each of the `groups`.

    `row_bytes`: of a row's query and output.
    """
    rows = max(min(MOST_ROWS, _MOST_BYTES // max(row_bytes, 1)), LEAST_ROWS)
    while True:
        shares = _shares(lengths, pasts, lows, tables, heads, slots, window, rows)
        if threads == 1 or len(shares) * groups >= threads * _SHARES_PER_THREAD or rows // 2 < LEAST_ROWS:
            break
        rows //= 2
    # The longest first: what is left for the end is short.
    shares.sort(key=lambda share: -share.cost)
    pieces = np.array([piece for share in shares for piece in share.pieces], np.int32)
    ends = np.cumsum([0, *(len(share.pieces) for share in shares)], dtype=np.int32)
    common = np.array([share.common for share in shares], np.int32)
    passes = max(sum(-(-count * heads // PASS_ROWS) for _, _, count in share.pieces) for share in shares)
    segment, begin, count = (np.ascontiguousarray(column) for column in pieces.T)
    return Shares(segment, begin, count, ends, common, passes)


def _shares(
    lengths: Numbers, pasts: Numbers, lows: Numbers, tables: Numbers, heads: int, slots: int, window: int | None,
    rows: int,
) -> list[_Share]:  # fmt: skip
    # Whole passes, where there are that many queries.
    step = PASS_ROWS // gcd(heads, PASS_ROWS)
    most = rows // heads // step * step or max(rows // heads, 1)
    shares: list[_Share] = []
    short: dict[int, list[int]] = {}
    for segment, length in enumerate(lengths.tolist()):
        if 2 * _padded(length, heads) <= rows and lows[segment] == 0 and window is None:
            short.setdefault(int(tables[segment, 0]), []).append(segment)
            continue
        for begin in range(0, length, most):
            count = min(most, length - begin)
            seen = pasts[segment] + begin + count / 2 - lows[segment]
            cost = count * float(seen if window is None else min(window, seen))
            shares.append(_Share([(segment, begin, count)], 0, cost))
    for beginning in short.values():
        shares += _together(beginning, lengths, pasts, tables, heads, slots, rows)
    return shares


def _together(
    segments: list[int], lengths: Numbers, pasts: Numbers, tables: Numbers, heads: int, slots: int, rows: int
) -> list[_Share]:
    """Segments with the same first page, as many in a share as have enough in common."""
    shares: list[_Share] = []
    size = 0
    for segment in segments:
        length, past = int(lengths[segment]), int(pasts[segment])
        piece, mine = (segment, 0, length), _padded(length, heads)
        cost = length * (past + length / 2)
        if shares and size + mine <= rows:
            last = shares[-1]
            common = min(last.common, past, _common(tables[last.pieces[0][0]], tables[segment]) * slots)
            if common >= max(_LEAST_COMMON, last.common // 2):
                shares[-1] = _Share([*last.pieces, piece], common, last.cost + cost)
                size += mine
                continue
        shares.append(_Share([piece], past, cost))
        size = mine
    return [share if len(share.pieces) > 1 else _Share(share.pieces, 0, share.cost) for share in shares]


def _common(a_N: Numbers, b_N: Numbers) -> int:
    """How many of the first pages are the same."""
    differ = np.flatnonzero(a_N != b_N)
    return int(differ[0]) if len(differ) else len(a_N)


def _padded(length: int, heads: int) -> int:
    return -(-length * heads // PASS_ROWS) * PASS_ROWS
