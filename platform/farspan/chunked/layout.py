"""A sequence as chunks that follow each other in time, each shared by all ranks. Pure.

Shapes: T tokens of the sequence, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from farspan.errors import ConfigError
from farspan.parallel.layout import Layout, Range, joined


@dataclass(frozen=True, slots=True)
class ChunkedLayout(Layout):
    """Rank r holds part r of each chunk: no token of a chunk sees one of a later chunk, whoever holds it.

    `chunk_tokens` are tokens of the sequence, over all ranks; the last chunk may be shorter.
    """

    num_tokens: int
    num_ranks: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        for field, value in (("memory.chunk_tokens", self.chunk_tokens), ("data.sequence_tokens", self.num_tokens)):
            if value < 1 or value % self.num_ranks != 0:
                way_out = f"use {max(1, -(-value // self.num_ranks)) * self.num_ranks}"
                raise ConfigError(field, f"must be a multiple of parallel.sp ({self.num_ranks})", value, way_out)

    @property
    def chunks(self) -> tuple[Range, ...]:
        """Global ranges of the chunks, in order."""
        step, end = self.chunk_tokens, self.num_tokens
        return tuple((start, min(start + step, end)) for start in range(0, end, step))

    def part_of(self, chunk: Range, rank: int) -> Range:
        """The global range of a chunk that `rank` holds."""
        start, stop = chunk
        share = (stop - start) // self.num_ranks
        return start + rank * share, start + (rank + 1) * share

    def held_rows(self, chunk: Range) -> slice:
        """Where a chunk lies among the tokens of any one rank."""
        return slice(chunk[0] // self.num_ranks, chunk[1] // self.num_ranks)

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        return joined(self.part_of(chunk, rank) for chunk in self.chunks)
