"""Which plan needs less memory than the one that did not fit, one rung at a time. Pure.

The order is the price in speed: smaller tiles cost little, computing again about a third, copies to the host what the
link cannot hide, chunks another forward, and more processes for one sequence fewer sequences side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from farspan.config.check import CHUNK_STRATEGIES, check_run
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError

_SMALLEST_TILE, _SMALLEST_CHUNK = 128, 256


@dataclass(frozen=True, slots=True)
class Rung:
    """One step down: the dotted fields it changed, and how a reader would say it."""

    fields: tuple[str, ...]
    text: str


@dataclass
class Ladder:
    """The plans of one run, each needing less memory than the one before."""

    config: RunConfig
    _above: RunConfig | None = None
    _last: Rung | None = None
    _refused: frozenset[tuple[str, ...]] = frozenset()

    def down(self) -> Rung | None:
        """The next lower plan; None, and nothing changed, when there is none."""
        return self._go_down_from(self.config)

    def other(self) -> Rung | None:
        """Another plan in place of the last one, which the model turned out not to allow; None without a last one."""
        if self._above is None or self._last is None:
            return None
        self._refused |= {self._last.fields}
        return self._go_down_from(self._above)

    def _go_down_from(self, config: RunConfig) -> Rung | None:
        lower = step_down(config, self._refused)
        if lower is None:
            return None
        self._above = config
        self.config, self._last = lower
        return self._last


def step_down(config: RunConfig, refused: frozenset[tuple[str, ...]] = frozenset()) -> tuple[RunConfig, Rung] | None:
    """The nearest plan that needs less memory per process, trains on the same sequences, and is legal.

    `refused` holds the fields of rungs that this model turned out not to allow. None: there is no lower rung.
    """
    for change in _RUNGS:
        lower = copy.deepcopy(config)
        for rung in change(lower):
            if rung.fields not in refused and _is_legal(lower):
                return lower, rung
    return None


def _tiles(config: RunConfig) -> Iterator[Rung]:
    if config.memory.tiled_mlp:
        return
    before = config.train.loss_tile_tokens
    config.memory.tiled_mlp, config.train.loss_tile_tokens = True, max(_SMALLEST_TILE, before // 2)
    if before < _SMALLEST_TILE:
        config.train.loss_tile_tokens = before
    text = f"MLPs and norms by tiles, loss tiles {before} -> {config.train.loss_tile_tokens} tokens"
    yield Rung(("memory.tiled_mlp", "train.loss_tile_tokens"), text)


def _recompute(config: RunConfig) -> Iterator[Rung]:
    if not config.train.recompute and config.memory.chunk == "none":
        config.train.recompute = True
        yield Rung(("train.recompute",), "layers are computed again in backward")


def _offload(config: RunConfig) -> Iterator[Rung]:
    memory, field = config.memory, "memory.offload_activations"
    # On a CPU the host's memory is the one that did not suffice.
    if memory.offload_activations != "none" or config.resources.gpus_per_worker == 0:
        return
    memory.offload_activations = "cpu"
    if memory.chunk == "none":
        yield Rung((field,), "tensors kept for backward wait in host memory")
    else:
        yield Rung((field, "memory.chunk"), "keys and values of all chunks lie in host memory")


def _chunks(config: RunConfig) -> Iterator[Rung]:
    shard_tokens = config.data.sequence_tokens // config.parallel.sp
    memory = config.memory
    now = shard_tokens if memory.chunk == "none" else min(memory.chunk_tokens, shard_tokens)
    smaller = now // (4 if memory.chunk == "none" else 2)
    if smaller < _SMALLEST_CHUNK or memory.chunk == "spaco":
        return
    if memory.chunk == "none":
        # Chunks keep only one chunk's tensors; where keys and values lie is a rung of its own.
        config.train.recompute, memory.offload_activations, memory.swap_share = False, "none", 0.0
    memory.chunk, memory.chunk_tokens = "seco", smaller
    if config.parallel.strategy not in CHUNK_STRATEGIES:
        # Chunks do not go around a ring.
        config.parallel.strategy, config.parallel.ulysses = "ulysses", 1
    config.parallel.layout = "auto"
    yield Rung(("memory.chunk", "memory.chunk_tokens"), f"the sequence goes through in chunks of {smaller} tokens")


def _more_ranks(config: RunConfig) -> Iterator[Rung]:
    parallel, dp = config.parallel, config.parallel.workers // config.parallel.sp
    if dp % 2 != 0:
        return
    # Half as many sequences side by side, twice as many after each other: the same sequences in one step.
    parallel.sp, config.train.accumulation = parallel.sp * 2, config.train.accumulation * 2
    parallel.rank_tokens //= 2
    yield Rung(
        ("parallel.sp", "train.accumulation"),
        f"{parallel.sp} processes share a sequence, accumulation {config.train.accumulation}",
    )


def _smaller_tiles(config: RunConfig) -> Iterator[Rung]:
    smaller = config.train.loss_tile_tokens // 2
    if smaller >= _SMALLEST_TILE:
        config.train.loss_tile_tokens = smaller
        yield Rung(("train.loss_tile_tokens",), f"loss tiles of {smaller} tokens")


_RUNGS: tuple[Callable[[RunConfig], Iterator[Rung]], ...] = (
    _tiles,
    _recompute,
    _offload,
    _chunks,
    _more_ranks,
    _smaller_tiles,
)


def _is_legal(config: RunConfig) -> bool:
    try:
        check_run(config)
    except ConfigError:
        return False
    return True
