"""Which blocks of queries and keys meet: the causal, in-document, in-window, in-chunk pairs as a list of slices.

Pure. Ranges are global token ranges in the order a rank holds them; slices are positions in that order.
Inside a pair positions are contiguous on both sides, so one offset and one window describe what is visible.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from farspan.parallel.layout import Layout, Range


@dataclass(frozen=True, slots=True)
class Pair:
    """Queries and keys of two shards that meet. `offset` and `window` as in the attention contract."""

    queries: slice
    keys: slice
    offset: int | None
    window: int | None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range inside one segment (a document, or a chunk of one), and where its first token lies in the shard."""

    start: int
    stop: int
    at: int


def pairs(
    query_ranges: Sequence[Range],
    key_ranges: Sequence[Range],
    bounds: Sequence[int],
    window: int | None = None,
    chunk: int | None = None,
) -> list[Pair]:
    """Every visible (query, key) once: key <= query, same document, same chunk of it, fewer than `window` apart.

    Chunks are counted from the first token of a document. Queries and keys that see nothing are cut away, so each
    query of a pair sees at least one key and each key is seen.
    """
    keys_of: dict[int, list[_Piece]] = {}
    for segment, piece in _pieces(key_ranges, bounds, chunk):
        keys_of.setdefault(segment, []).append(piece)
    found = [
        _pair(queries, keys, window)
        for segment, queries in _pieces(query_ranges, bounds, chunk)
        for keys in keys_of.get(segment, ())
    ]
    return [pair for pair in found if pair is not None]


def chunk_bounds(bounds: Sequence[int], chunk: int | None) -> tuple[int, ...]:
    """`bounds` with every document cut into chunks of `chunk` tokens: chunked attention is packed attention."""
    if chunk is None:
        return tuple(bounds)
    return (*(at for start, stop in pairwise(bounds) for at in range(start, stop, chunk)), bounds[-1])


@dataclass(frozen=True, slots=True)
class PairTable:
    """The pairs between every two ranks of a sequence, each list made once."""

    ranges: tuple[tuple[Range, ...], ...]
    bounds: tuple[int, ...]
    fixed: bool = False
    """Whether the ranges are the same for any documents."""
    _made: dict[tuple[int, int, int | None, int | None], list[Pair]] = field(default_factory=dict, compare=False)
    _hops: dict[int, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, layout: Layout, bounds: Sequence[int]) -> PairTable:
        return cls(
            tuple(layout.ranges_of(rank) for rank in range(layout.num_ranks)), tuple(bounds), not layout.cuts_documents
        )

    def between(self, query_rank: int, key_rank: int, window: int | None, chunk: int | None) -> list[Pair]:
        """Pairs of the queries of one rank with the keys of another."""
        name = (query_rank, key_rank, window, chunk)
        if name not in self._made:
            self._made[name] = pairs(self.ranges[query_rank], self.ranges[key_rank], self.bounds, window, chunk)
        return self._made[name]

    def hops(self, window: int | None, chunk: int | None) -> tuple[int, ...]:
        """The distances h > 0 at which some rank r may need keys of rank r - h, in ascending order.

        Decided by the ranges and the reach of a window or chunk, never by where documents end: what is sent is known
        before the documents are. Where the ranges follow the documents every hop is made.
        """
        num_ranks, reach = len(self.ranges), min((n for n in (window, chunk) if n is not None), default=None)
        if reach is None or not self.fixed:
            return tuple(range(1, num_ranks))
        if reach not in self._hops:
            whole = (0, self.bounds[-1])
            self._hops[reach] = tuple(
                hop
                for hop in range(1, num_ranks)
                if any(pairs(self.ranges[r], self.ranges[r - hop], whole, reach) for r in range(num_ranks))
            )
        return self._hops[reach]


def _pieces(ranges: Sequence[Range], bounds: Sequence[int], chunk: int | None) -> Iterator[tuple[int, _Piece]]:
    """(first token of the segment, piece of a range inside it), in shard order."""
    at = 0
    for start, stop in ranges:
        while start < stop:
            document = bisect_right(bounds, start) - 1
            segment, end = bounds[document], bounds[document + 1]
            if chunk is not None:
                segment += (start - segment) // chunk * chunk
                end = min(end, segment + chunk)
            end = min(end, stop)
            yield segment, _Piece(start, end, at)
            at += end - start
            start = end


def _pair(queries: _Piece, keys: _Piece, window: int | None) -> Pair | None:
    first_query, last_key = max(queries.start, keys.start), min(keys.stop, queries.stop)
    first_key, last_query = keys.start, queries.stop
    if window is not None:
        last_query = min(last_query, last_key - 1 + window)
        first_key = max(first_key, first_query - window + 1)
    if first_query >= last_query or first_key >= last_key:
        return None
    causal = first_query < last_key - 1
    banded = window is not None and last_query - 1 - first_key >= window
    return Pair(
        queries=slice(queries.at + first_query - queries.start, queries.at + last_query - queries.start),
        keys=slice(keys.at + first_key - keys.start, keys.at + last_key - keys.start),
        offset=first_query - first_key if causal or banded else None,
        window=window if banded else None,
    )
