"""parallel.hdp_cost=measured: seconds of this model on these ranks, measured once in a run and kept in its folder.

The plan of a step has to be the same on every rank and after every restart, and seconds never are. So rank 0 decides
from what all ranks timed, everybody gets its numbers, and `<output>/hdp_cost.json` has them before the first step
begins: who goes on reads them there, on whatever machine. They are kept for each model, type and layout of the run; the
machine is only told. What another number of ranks finds there it takes.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from farspan.batch import PackedBatch
from farspan.config.schema import RunConfig
from farspan.data.balance import Cost
from farspan.errors import CorruptDataError
from farspan.parallel.shard import gathered
from farspan.plan.facts import ModelFacts
from farspan.plan.hdp_cost import Trial, fit_cost, trials_of
from farspan.plan.hybrid import HDP_COST
from farspan.storage.door import open_store
from farspan.storage.paths import join_uri
from farspan.storage.patience import patiently
from farspan.train.checkpoint import of_all_ranks, on_rank_0
from farspan.train.hdp import HybridStep, Work
from farspan.train.rescue import refused_without_memory
from farspan.train.step import TrainStep

_FORMAT, _ROUNDS = 1, 3
# Ids far apart: a router of experts should not see the same token again and again.
_STRIDE = 7919


@dataclass(frozen=True, slots=True)
class KeptCost:
    """One cost in seconds, and what it was measured of."""

    key: dict[str, Any]
    """Model, type and layout, in plain values."""
    machine: str
    cost: Cost
    error: float
    """Largest miss among what was timed, as a share."""

    def text(self) -> str:
        """For a reader, in one line."""
        cost = self.cost
        sent = ""
        if cost.message or cost.travel:
            sent = f", each of R ranks that share one (R - 1) * ({cost.message:.3g} + {cost.travel:.3g} s / R) more"
        return (
            f"parallel.hdp_cost=measured: a document of s tokens takes {cost.quadratic:.3g} s^2 + {cost.linear:.3g} s "
            f"+ {cost.each:.3g} seconds, a micro-batch {cost.fixed:.3g} more{sent}; off by at most {self.error:.0%} of "
            f"what was timed on {self.machine}"
        )


def cost_key(config: RunConfig, facts: ModelFacts, strategy: str, compute: torch.dtype) -> dict[str, Any]:
    """What a measured cost is of: the shape of the model, its type, and what a micro-batch makes of it.

    Neither the machine nor the number of ranks: a run that goes on elsewhere goes on with the same numbers.
    """
    shape = ("name", "num_layers", "width", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size", "num_parameters")
    memory, train, parallel = config.memory, config.train, config.parallel
    return {
        "model": {name: getattr(facts, name) for name in shape} | {"lora_rank": config.lora.rank},
        "dtype": str(compute).removeprefix("torch."),
        "layout": {
            "strategy": strategy,
            "rank_tokens": parallel.rank_tokens or config.data.sequence_tokens // parallel.sp,
            "sequence_tokens": config.data.sequence_tokens,
            "spill": parallel.spill,
            "recompute": train.recompute,
            "loss_tile_tokens": train.loss_tile_tokens,
            "tiled_mlp": memory.tiled_mlp,
            "mlp_tile_tokens": memory.mlp_tile_tokens,
            "offload_activations": memory.offload_activations,
            "swap_share": memory.swap_share,
        },
    }


def measured_cost(
    config: RunConfig, key: dict[str, Any], step: TrainStep, clock: Callable[[], float] = time.perf_counter
) -> tuple[Cost, str]:
    """(the cost, one line about it): what the run's folder has under `key`, or what is measured now and put there.

    Collective, the same on every rank. Measuring leaves weights, gradients, random numbers, the cursor and what the run
    counts as read as they are. A run with train.resume=false measures anew.

    Raises:
        CorruptDataError: the folder's file cannot be read.
        UnreachableError: it could not be written.
        OutOfMemoryError: memory did not suffice to measure.
    """
    hybrid = _hybrid(step)
    place = join_uri(config.output, HDP_COST)
    known = on_rank_0(lambda: _find(_read(config), key) if config.train.resume else None)
    if known is not None:
        return known.cost, f"{known.text()}, as {place} says"
    trials = trials_of(hybrid.capacity, config.data.sequence_tokens, hybrid.sets.num_ranks)
    with refused_without_memory("measuring for parallel.hdp_cost=measured"):
        seconds = time_trials(step, trials, clock)

    def keep() -> KeptCost:
        fitted = fit_cost(trials, seconds)
        found = KeptCost(key, machine_name(step.device), fitted.cost, fitted.error)
        _write(config, found)
        return found

    # By rank 0 alone: another processor may round the same fit otherwise.
    found = on_rank_0(keep)
    return found.cost, f"{found.text()}, kept in {place}"


def forget_cost(output: str) -> None:
    """Remove what an earlier run measured, for one that starts over."""
    open_store(output).delete(HDP_COST)


def machine_name(device: torch.device) -> str:
    """The device a rank computes on, and whose."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{platform.node()} ({name})"


def time_trials(step: TrainStep, trials: Sequence[Trial], clock: Callable[[], float]) -> list[float]:
    """Seconds of forward and backward of each, by `clock`: the quickest of a few on each rank, the mean over ranks.

    All ranks compute at once, as in a step; a document on several ranks is computed by as many such sets as there are.
    """
    hybrid, weights = _hybrid(step), step.weights
    work = [_work(hybrid, one, weights.module.model.config.get_text_config(decoder=True).vocab_size) for one in trials]
    best = [math.inf] * len(trials)
    num_labels = torch.ones((), dtype=torch.float64, device=step.device)
    devices = [step.device] if step.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), gathered(weights.module):
        for round_number in range(1 + _ROUNDS):
            for number, one in enumerate(work):
                _meet(step)
                if one is None:
                    continue
                started = clock()
                hybrid.compute(weights, one, num_labels, step.offload)
                _settle(step.device)
                # Whatever is compiled or allocated once is so in the first round.
                if round_number > 0:
                    best[number] = min(best[number], clock() - started)
        hybrid.sum_over_ranks(weights, num_labels)
    weights.module.zero_grad()
    every = zip(*of_all_ranks(best), strict=True)
    timed = [[seconds for seconds in found if seconds < math.inf] for found in every]
    return [sum(found) / len(found) for found in timed]


def _hybrid(step: TrainStep) -> HybridStep:
    assert step.hybrid is not None, "only documents with ranks of their own are balanced by cost"
    return step.hybrid


def _work(hybrid: HybridStep, trial: Trial, vocab_size: int) -> Work | None:
    """What this rank computes of `trial`; nothing where too few ranks are left for another set."""
    first = hybrid.sets.rank // trial.num_ranks * trial.num_ranks
    if first + trial.num_ranks > hybrid.sets.num_ranks:
        return None
    tokens_T = torch.arange(sum(trial.lengths)) * _STRIDE % vocab_size
    positions_T = torch.cat([torch.arange(tokens) for tokens in trial.lengths])
    batch = PackedBatch(tokens_T, tokens_T, positions_T, (0, *accumulate(trial.lengths)), ())
    work = hybrid.work_on(batch, tuple(range(first, first + trial.num_ranks)))
    return Work(work.shard.to(hybrid.device), work.attention, work.whole, work.spilled)


def _meet(step: TrainStep) -> None:
    """Every rank is here, and its device has nothing left to do."""
    dist.all_reduce(torch.zeros(1, device=step.device), group=step.mesh.all.get_group())
    _settle(step.device)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(config: RunConfig) -> list[KeptCost]:
    """What the run's folder has; nothing where nothing was kept."""

    def content() -> bytes | None:
        store = open_store(config.output)
        return store.read_bytes(HDP_COST) if store.exists(HDP_COST) else None

    found = patiently(content, config.output, config.resources.timeout_s / 2)
    if found is None:
        return []
    try:
        whole = json.loads(found)
        if whole["format"] != _FORMAT:
            raise ValueError(f"format {whole['format']} instead of {_FORMAT}")
        return [
            KeptCost(dict(one["key"]), str(one["machine"]), Cost(**one["seconds"]), float(one["error"]))
            for one in whole["costs"]
        ]
    except (ValueError, KeyError, TypeError) as problem:
        what = f"is no measured cost ({problem}); restore it, or remove it and it is measured anew"
        raise CorruptDataError(join_uri(config.output, HDP_COST), what) from None


def _find(kept: Sequence[KeptCost], key: dict[str, Any]) -> KeptCost | None:
    return next((one for one in kept if one.key == key), None)


def _write(config: RunConfig, found: KeptCost) -> None:
    """Beside those of other layouts of this run: one that memory did not suffice for may be tried again."""
    others = [one for one in _read(config) if one.key != found.key] if config.train.resume else []
    listed = [
        {"key": one.key, "machine": one.machine, "seconds": asdict(one.cost), "error": one.error}
        for one in (*others, found)
    ]
    data = json.dumps({"format": _FORMAT, "costs": listed}, indent=1).encode()
    patiently(
        lambda: open_store(config.output).write_bytes(HDP_COST, data), config.output, config.resources.timeout_s / 2
    )
