"""Which tier each kind of bytes of a run is given, and why: sizes and touches for `memory.placement`. Pure.

Everything is of one process. What the processor computes on (AdamW and its weights, the sums of an arena's gradients)
stays in local DRAM as long as there is room; what only passes through is striped over CXL memory by speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ConfigError, PlanError
from farspan.memory.placement import Decision, Item, Place, place
from farspan.memory.speeds import Speed, is_known, is_place, place_of
from farspan.parallel.heads import plan_heads
from farspan.plan.facts import ModelFacts
from farspan.plan.hybrid import rank_tokens
from farspan.plan.profile import LayerBytes

OPTIMIZER, ACTIVATIONS, ARENA, ARENA_GRADIENTS = "optimizer", "activations", "KV arena", "KV gradients"
HOST = "host memory"
"""The name of local DRAM where memory.tiers describes none."""
# What a user writes -> the kinds of tier that names; auto: the policy takes what is best.
_NAMED = {"cpu": ("dram",), "cxl": ("cxl",), "nvme": ("nvme",), "auto": ()}
_IN_PLACE = ("dram", "cxl")
_ITEMS = {
    OPTIMIZER: "the optimizer with its weights and gradients",
    ACTIVATIONS: "what layers keep for backward",
    ARENA: "the arena of keys and values",
    ARENA_GRADIENTS: "the arena of their gradients",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Bytes of one kind that do not lie on the device. A part of them (a layer's) is placed as a whole, or striped."""

    name: str
    parts: tuple[int, ...]
    touches_per_step: float
    computed_on: bool = False
    only: tuple[str, ...] = ()
    """Kinds of tier that may hold it; empty: all."""

    @property
    def nbytes(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class Given:
    """A kind of bytes, (tier, bytes) of where it lies, and why in one sentence; `refused`: of what does not fit."""

    kind: Kind
    shares: tuple[tuple[str, int], ...]
    reason: str
    refused: str | None = None

    def text(self) -> str:
        """For a reader."""
        where = " + ".join(f"{nbytes / 2**20:,.1f} MiB in {name}" for name, nbytes in self.shares)
        return f"{where}: {self.reason}" if where else self.reason


def kinds_of(
    config: RunConfig,
    parallel: ParallelConfig,
    facts: ModelFacts,
    layers: Sequence[LayerBytes],
    compute_bytes: int,
    optimizer_bytes: int,
    *,
    on_gpu: bool,
) -> tuple[Kind, ...]:
    """What of a checked run lies beside the device. `layers` may be empty where `needs_trace` says so."""
    found = []
    if config.weights.offload_optimizer != "none" and config.weights.engine == "fsdp2":
        # AdamW reads and writes everything once; CXL memory is host memory too, where DRAM does not suffice.
        found.append(Kind(OPTIMIZER, (optimizer_bytes,), 2.0, computed_on=True, only=_IN_PLACE))
    if config.memory.offload_activations == "none":
        return tuple(found)
    only, turns = _NAMED[config.memory.offload_activations], config.train.accumulation
    if config.memory.chunk != "none":
        return (*found, *_arena(config, parallel, facts, compute_bytes, on_gpu=on_gpu))
    kept = [round(nbytes) for nbytes in _kept(config, parallel, facts, layers, compute_bytes)]
    return (*found, Kind(ACTIVATIONS, tuple(kept), 2.0 * turns, only=only))


def needs_trace(config: RunConfig) -> bool:
    """Whether a trace of the model's layers has to say what they keep."""
    memory = config.memory
    if memory.offload_activations == "none" or memory.chunk != "none":
        return False
    return not config.train.recompute or memory.swap_share != 0


def places_of(
    tiers: Sequence[str], kinds: Sequence[Kind], speeds: Mapping[str, Speed], host_bytes: int
) -> dict[str, Place]:
    """Description of each tier of memory.tiers, or `HOST`, -> how the policy sees it.

    `host_bytes`: what may be taken of local DRAM where no tier describes it and something may lie there.

    Raises:
        ConfigError: a kind of tier that the run names is not described.
    """
    found: dict[str, Place] = {}
    for number, text in enumerate(tiers):
        if is_place(text):
            found[key_of(tiers, number)] = place_of(text, _shown(text, number, tiers), speeds)
    described = {seen.kind for seen in found.values()}
    if "dram" not in described and any(not kind.only or "dram" in kind.only for kind in kinds):
        found[HOST] = place_of(f"dram:{max(1, host_bytes)}", HOST, speeds)
        described.add("dram")
    for kind in kinds:
        if kind.only and not described & set(kind.only):
            _refuse_missing(kind, tiers)
    return found


def key_of(tiers: Sequence[str], number: int) -> str:
    """A name for each tier, also where two are described alike."""
    return tiers[number] if tiers.index(tiers[number]) == number else f"{tiers[number]} #{number + 1}"


def assign(kinds: Sequence[Kind], places: Sequence[Place]) -> tuple[Given, ...]:
    """What `place` decides of every kind."""
    items = [
        Item(_ITEMS[kind.name], part, kind.touches_per_step, kind.computed_on, kind.only)
        for kind in kinds
        for part in kind.parts
        if part > 0
    ]
    decisions = iter(place(items, places))
    return tuple(_given(kind, [next(decisions) for part in kind.parts if part > 0]) for kind in kinds)


def unmeasured(tiers: Sequence[str], places: Mapping[str, Place], speeds: Mapping[str, Speed]) -> list[int]:
    """Numbers of the tiers whose speed has to be measured: unknown, and shared with another of the same kind."""
    kinds = [found.kind for found in places.values()]
    keys = ((number, key_of(tiers, number)) for number in range(len(tiers)))
    shared = [number for number, key in keys if key in places and kinds.count(places[key].kind) > 1]
    return [number for number in shared if not is_known(tiers[number], speeds)]


def refuse_unplaced(config: RunConfig, given: Sequence[Given]) -> None:
    """What is predicted not to fit is refused, unless the user named its place: a prediction may be wrong.

    Raises:
        PlanError: with the policy's reason.
    """
    for one in given:
        sure = one.kind.name == OPTIMIZER or config.memory.offload_activations == "auto"
        if one.refused is not None and sure:
            raise PlanError(f"memory.tiers: {one.refused}")


def _given(kind: Kind, decisions: Sequence[Decision]) -> Given:
    shares: dict[str, int] = {}
    for name, nbytes in (share for decision in decisions for share in decision.shares):
        shares[name] = shares.get(name, 0) + nbytes
    placed = dict.fromkeys(decision.reason for decision in decisions if not decision.refused)
    refused = next((decision.reason for decision in decisions if decision.refused), None)
    why = "; ".join(placed) or refused or f"{_ITEMS[kind.name]} takes no bytes"
    return Given(kind, tuple(shares.items()), why, refused)


def _kept(
    config: RunConfig,
    parallel: ParallelConfig,
    facts: ModelFacts,
    layers: Sequence[LayerBytes],
    compute_bytes: int,
) -> list[float]:
    """Bytes each layer keeps of one sequence. A share that is measured later is asked for as if it were whole."""
    tokens = rank_tokens(config) if parallel.hdp else config.data.sequence_tokens // parallel.sp
    share = config.memory.swap_share
    if config.train.recompute:
        again = float(tokens * facts.width * compute_bytes)
        if share == 0:
            return [again] * facts.num_layers
        alpha = 1.0 if isinstance(share, str) else share
        return [again + tokens * (x.attention + alpha * x.products) for x in layers]
    return [tokens * x.saved for x in layers]


def _arena(
    config: RunConfig, parallel: ParallelConfig, facts: ModelFacts, compute_bytes: int, *, on_gpu: bool
) -> tuple[Kind, ...]:
    """Keys and values of all chunks, and the sums of their gradients, which a later chunk adds to where they lie."""
    memory = config.memory
    named = _NAMED[memory.offload_activations]
    shard = config.data.sequence_tokens // parallel.sp
    heads = plan_heads(facts.num_q_heads, facts.num_kv_heads, parallel.sp if parallel.strategy == "ulysses" else 1)
    layer = 2 * heads.kv_heads * facts.head_dim * compute_bytes * shard
    parts = (layer,) * (facts.num_layers - len(facts.recurrent_layers))
    # A chunk reads what lies before it, which is half of the arena on average, in two forwards and in backward.
    before = (math.ceil(config.data.sequence_tokens / memory.chunk_tokens) - 1) / 2
    turns, free = config.train.accumulation, not named
    only = named or _IN_PLACE
    return (
        # Without a GPU attention reads keys and values where they are.
        Kind(ARENA, parts, turns * (1 + 3 * before), computed_on=free and not on_gpu, only=only),
        Kind(ARENA_GRADIENTS, parts, turns * (1 + 2 * before), computed_on=free, only=only),
    )


def _shown(text: str, number: int, tiers: Sequence[str]) -> str:
    key = key_of(tiers, number)
    return f"{key} (emulated)" if ":emulated:" in text else key


def _refuse_missing(kind: Kind, tiers: Sequence[str]) -> None:
    missing = kind.only[0]
    raise ConfigError(
        "memory.tiers",
        f"must describe a tier of kind {missing} for memory.offload_activations={missing}",
        list(tiers),
        f"add {'cxl:node=N:64GiB' if missing == 'cxl' else 'nvme:/folder:64GiB'} or use offload_activations=cpu",
    )
