"""With how many workers a run may go on so that nothing but the order of summing changes. Pure.

A step takes (workers / sp) * accumulation sequences. A smaller run takes the same ones: fewer side by side, more after
each other. So a size is legal when it is a multiple of sp and its groups share the sequences of a step evenly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from farspan.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Size:
    """Workers of a run, and the sequences each of their groups adds up before a step."""

    workers: int
    accumulation: int


def legal_sizes(config: RunConfig) -> list[Size]:
    """From `parallel.workers` down to `parallel.min_workers`, largest first; only the former when that is 0."""
    parallel = config.parallel
    sequences = parallel.workers // parallel.sp * config.train.accumulation
    least = parallel.min_workers or parallel.workers
    return [
        Size(groups * parallel.sp, sequences // groups)
        for groups in range(parallel.workers // parallel.sp, 0, -1)
        if groups * parallel.sp >= least and sequences % groups == 0
    ]


def at_size(config: RunConfig, size: Size) -> RunConfig:
    """A copy of `config` for that many workers."""
    resized = copy.deepcopy(config)
    resized.parallel.workers, resized.train.accumulation = size.workers, size.accumulation
    resized.parallel.min_workers = min(config.parallel.min_workers, size.workers)
    return resized
