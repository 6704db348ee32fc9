"""From a run's config to open tiers: what lies beside the device is asked for with its real sizes, and placed.

Every rank comes to the same decision, and so does every later start of the run: sizes follow from the model, and what
was measured (speeds, and how much host memory was free) is agreed upon and kept in `<output>/tiers.json`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import CorruptDataError
from farspan.memory.available import available_bytes
from farspan.memory.host import DramTier
from farspan.memory.open import open_tier
from farspan.memory.placement import Place
from farspan.memory.speeds import Speed, measure_speed, read_speeds, rows_of
from farspan.memory.tier import Tier
from farspan.optim.host import needed_bytes
from farspan.plan.facts import model_facts
from farspan.plan.run_plan import RunPlan
from farspan.plan.tiers import HOST, Kind, assign, key_of, kinds_of, needs_trace, places_of, refuse_unplaced, unmeasured
from farspan.plan.trace import trace_layers
from farspan.storage.door import open_store
from farspan.train.checkpoint import of_all_ranks, on_rank_0
from farspan.train.limit import memory_limit
from farspan.train.offload import RunTiers

FILE = "tiers.json"
_SHARE_OF_HOST = 0.8


@dataclass
class Known:
    """What was measured of a run's tiers. `host_bytes` 0: of no consequence so far."""

    speeds: dict[str, Speed] = field(default_factory=dict)
    host_bytes: int = 0


def open_run_tiers(
    config: RunConfig, model: PreTrainedModel, parallel: ParallelConfig, device: torch.device, compute: torch.dtype
) -> RunTiers | None:
    """The tiers of this rank, before the model is cut; none where everything lies on the device. Collective.

    Raises:
        ConfigError: a tier the run names is not described, or is none.
        PlanError: something fits nowhere.
        TierError: this machine does not have a tier, or it does not work.
    """
    kinds = run_kinds(config, model, parallel, device, compute)
    if not kinds:
        return None
    told, kept = on_rank_0(lambda: (given_speeds(config), kept_of_run(config)))
    free = _free_bytes()
    host_bytes = kept.host_bytes or min(of_all_ranks(free))
    with ExitStack() as undo:
        opened: dict[str, Tier] = {}
        for number, text in enumerate(config.memory.tiers):
            opened[key_of(config.memory.tiers, number)] = tier = open_tier(text, device, open_store)
            undo.callback(tier.close)
        places = places_of(config.memory.tiers, kinds, {}, host_bytes)
        if HOST in places:
            opened[HOST] = DramTier(free, device=device if device.type == "cuda" else None)
            undo.callback(opened[HOST].close)
        speeds = {**kept.speeds, **told}
        speeds |= _measured(config, opened, places, speeds, device)
        places = places_of(config.memory.tiers, kinds, speeds, host_bytes)
        if len(places) > 1:
            found = Known(speeds, host_bytes if HOST in places else 0)
            on_rank_0(lambda: _keep(config, kept, found))
        given = assign(kinds, list(places.values()))
        refuse_unplaced(config, given)
        names = {places[key].name if key in places else key: tier for key, tier in opened.items()}
        undo.pop_all()
    return RunTiers(names, given)


def run_kinds(
    config: RunConfig, model: PreTrainedModel, parallel: ParallelConfig, device: torch.device, compute: torch.dtype
) -> tuple[Kind, ...]:
    """What lies beside the device, with the sizes of this very model before it is cut over the ranks."""
    layers = trace_layers(model.config, compute, tiled=config.memory.tiled_mlp) if needs_trace(config) else ()
    # The next gradients wait beside the sum wherever backward comes more than once in a step.
    adds = config.train.accumulation > 1 or config.memory.chunk != "none" or parallel.hdp
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = needed_bytes(trained, dist.get_world_size(), config.optim.kind, adds=adds)
    facts = model_facts(model.config)
    return kinds_of(config, parallel, facts, layers, compute.itemsize, optimizer, on_gpu=device.type == "cuda")


def plan_tiers(
    config: RunConfig, model: PretrainedConfig, plan: RunPlan, compute: torch.dtype, *, on_gpu: bool
) -> RunPlan:
    """`plan` with what its run will decide, as far as that is known before: nothing is opened and nothing measured.

    Raises:
        ConfigError, PlanError: as `open_run_tiers`.
    """
    layers = trace_layers(model, compute, tiled=config.memory.tiled_mlp) if needs_trace(config) else ()
    kinds = kinds_of(
        config, plan.parallel, model_facts(model), layers, compute.itemsize, plan.host_bytes, on_gpu=on_gpu
    )
    if not kinds:
        return plan
    tiers = config.memory.tiers
    known = kept_of_run(config) if len(places_of(tiers, kinds, {}, 1)) > 1 else Known()
    speeds = {**known.speeds, **given_speeds(config)}
    # How much of its memory a host of the run has free is known there and then.
    places = places_of(tiers, kinds, speeds, known.host_bytes or sys.maxsize)
    given = assign(kinds, list(places.values()))
    refuse_unplaced(config, given)
    asked = dict.fromkeys(tiers[number] for number in unmeasured(tiers, places, speeds))
    return replace(plan, tiers=given, unmeasured=tuple(asked))


def given_speeds(config: RunConfig) -> dict[str, Speed]:
    """What the user's file says.

    Raises:
        NotFoundError, CorruptDataError: there is none, or it is none.
    """
    source = config.memory.speeds
    if source is None:
        return {}
    folder, _, name = source.rpartition("/")
    return read_speeds(source, open_store(folder or "/").read_bytes(name))


def kept_of_run(config: RunConfig) -> Known:
    """What an earlier start of this run measured."""
    store = open_store(config.output)
    if not store.exists(FILE):
        return Known()
    source, data = f"{config.output}/{FILE}", store.read_bytes(FILE)
    try:
        return Known(read_speeds(source, data), int(json.loads(data)["host_bytes"]))
    except (KeyError, TypeError, ValueError):
        raise CorruptDataError(source, "is not what a run writes about its tiers; remove it") from None


def _keep(config: RunConfig, kept: Known, found: Known) -> None:
    if found == kept:
        return
    content = {"host_bytes": found.host_bytes, "rows": rows_of(found.speeds)}
    open_store(config.output).write_bytes(FILE, (json.dumps(content, indent=1) + "\n").encode())


def _measured(
    config: RunConfig,
    opened: Mapping[str, Tier],
    places: Mapping[str, Place],
    speeds: Mapping[str, Speed],
    device: torch.device,
) -> dict[str, Speed]:
    """Description -> speed of tiers nobody knows, where another of the same kind makes it matter; collective."""
    found: dict[str, Speed] = {}
    for number in unmeasured(config.memory.tiers, places, speeds):
        text, key = config.memory.tiers[number], key_of(config.memory.tiers, number)
        if text in found:
            continue
        with memory_limit(device, config.memory.limit_gib):
            mine = measure_speed(opened[key], device, config.memory.limit_gib)
        every = of_all_ranks(mine)
        found[text] = Speed(min(one.bytes_per_s for one in every), max(one.latency_s for one in every))
    return found


def _free_bytes() -> int:
    """What a rank may take of this host's memory, when all of its ranks look at once; collective."""
    return int(_SHARE_OF_HOST * available_bytes() / local_ranks())


def local_ranks() -> int:
    """Processes of this run on this host; collective."""
    names = of_all_ranks(platform.node())
    return names.count(platform.node())
