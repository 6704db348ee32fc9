"""Who computes which keys: the work of all rows laid end to end and cut into equal shares.

A segment is what one softmax runs over (the queries of one row that read one key/value head); it has some tiles of
keys, perhaps none. Segments are laid end to end, and program w of W gets tiles w * total // W to (w + 1) * total // W
of the line: no two shares differ by more than one tile, however unequal the rows are. A share may begin and end inside
a segment; what it computes of one segment is a piece, a partial attention to be merged with the segment's others.

Along the line either the program or the segment goes up from piece to piece, so program + segment numbers the pieces
without a gap inside a segment: a piece's place in the workspace needs no table. The kernels compute the same on the
device, where the lengths are.

Source: LeanAttention (Sanovar et al. 2024, https://arxiv.org/abs/2405.10480) and stream-K
(Osama et al. 2023, https://arxiv.org/abs/2301.03598).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles first..stop of a segment, computed by one program."""

    program: int
    segment: int
    first: int
    stop: int

    @property
    def place(self) -> int:
        """Its row in the workspace."""
        return self.program + self.segment


def working_programs(total_tiles: int, num_programs: int) -> int:
    """Programs that get something: with fewer tiles than programs the rest stay idle, and no share is empty."""
    return min(total_tiles, num_programs)


def share(total_tiles: int, num_programs: int, program: int) -> range:
    """The tiles of the line that a program computes."""
    working = working_programs(total_tiles, num_programs)
    if program >= working:
        return range(0)
    return range(program * total_tiles // working, (program + 1) * total_tiles // working)


def owner(tile: int, total_tiles: int, num_programs: int) -> int:
    """The program whose share holds a tile of the line."""
    return ((tile + 1) * working_programs(total_tiles, num_programs) - 1) // total_tiles


def cut_line(tiles: Sequence[int], num_programs: int) -> list[Piece]:
    """Every piece, in the order of the line; `tiles` are those of each segment."""
    bounds = [0, *accumulate(tiles)]
    pieces: list[Piece] = []
    for program in range(num_programs):
        mine = share(bounds[-1], num_programs, program)
        for segment, begin in enumerate(bounds[:-1]):
            first, stop = max(mine.start, begin), min(mine.stop, bounds[segment + 1])
            if first < stop:
                pieces.append(Piece(program, segment, first - begin, stop - begin))
    return pieces


def places(tiles: Sequence[int], num_programs: int, segment: int) -> range:
    """Where in the workspace the pieces of a segment are."""
    bounds = [0, *accumulate(tiles)]
    if tiles[segment] == 0:
        return range(0)
    first = owner(bounds[segment], bounds[-1], num_programs)
    last = owner(bounds[segment + 1] - 1, bounds[-1], num_programs)
    return range(first + segment, last + segment + 1)


def tiles_of(length: int, tile_tokens: int, num_queries: int = 1, window: int | None = None) -> range:
    """The tiles of a row that any of its causal queries sees."""
    first = 0 if window is None else max(0, length - num_queries - window + 1)
    return range(min(first, length) // tile_tokens, -(-length // tile_tokens))
