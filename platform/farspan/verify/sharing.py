"""How the ranks of one sequence share it: the pieces under examination, as one replaceable object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from farspan.config.schema import ParallelConfig
from farspan.parallel.blockwise import Strategy
from farspan.parallel.layout import Layout
from farspan.parallel.mesh import make_mesh
from farspan.parallel.strategy import SequenceParallel, SequenceRanks

_TIMEOUT_S = 120.0


class Sharing(Protocol):
    """Layout, attention and exchanges of one sequence on this rank."""

    @property
    def ranks(self) -> SequenceRanks: ...

    def lay_out(self, num_tokens: int, bounds: tuple[int, ...]) -> Layout: ...

    def attention(self, layout: Layout, bounds: Sequence[int]) -> Strategy: ...


def share(parallel: ParallelConfig) -> Sharing:
    """What a run with this config uses, among all ranks of the default process group."""
    mesh = make_mesh("cpu", parallel.sp, parallel.ulysses, timeout_s=_TIMEOUT_S)
    return SequenceParallel(SequenceRanks.of(mesh), parallel.strategy, parallel.layout)
