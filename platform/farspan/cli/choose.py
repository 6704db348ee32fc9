"""What a run config leaves open is chosen by the planner; what it will cost is said before and compared after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from farspan.config.check import check_run
from farspan.config.schema import ParallelConfig, RunConfig
from farspan.errors import ConfigError
from farspan.plan.choice import Choice
from farspan.plan.cost import Plan, Task, plan_of_choice, refusal
from farspan.plan.machine import Machine, calibrated, parse_machine
from farspan.plan.run_plan import passes_of
from farspan.plan.search import Space, search
from farspan.plan.swap import predict_share, with_share
from farspan.telemetry.events import PlanPredicted

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Chosen:
    """The config that runs, and what the planner says of it; `predicted` is none where the machine is not known."""

    config: RunConfig
    predicted: PlanPredicted | None = None
    lines: tuple[tuple[str, str], ...] = ()


def choose_plan(
    config: RunConfig, written: frozenset[str], model: PretrainedConfig, machine: Machine | None = None
) -> Chosen:
    """The best plan that agrees with every key the user wrote, and with which the config is legal.

    `machine` is what the workers get; none: what the config says of it, or this machine. `written` are dotted keys.
    Where no plan that fits is such a one, the config stays as it is and the reason is said: an uncalibrated planner may
    be wrong, a user who wrote everything may know better.
    """
    machine = machine or _machine(config)
    if machine is None:
        return Chosen(config)
    task, space = task_of(config, model, machine)
    found = search(task, space)
    refused: ConfigError | None = None
    for plan in found.plans:
        if not _agrees(plan.choice, config, written):
            continue
        settings = {key: value for key, value in plan.choice.settings().items() if key not in written}
        changed = _with(config, settings)
        try:
            check_run(changed)
        except ConfigError as problem:
            # The planner does not know every rule between keys. Of the best plan is told why not.
            refused = refused or problem
            continue
        return Chosen(changed, _prediction(plan, config), (*_lines(plan, settings, config), *_swap(task, plan, config)))
    own = with_share(task, choice_of(config), config.memory.swap_share)
    why = refusal(task, own) or "no plan that fits agrees with what the config sets"
    if refused is not None:
        why = f"{why}; the best plan that agrees with it is refused: {refused}"
    plan = plan_of_choice(task, own)
    return Chosen(config, _prediction(plan, config), (("planner", f"as written; {why}"), *_swap(task, plan, config)))


def _machine(config: RunConfig) -> Machine | None:
    """The machine the workers get; none where nobody said and nobody can be asked."""
    wanted = config.plan
    if wanted.choose == "never":
        return None
    if config.resources.gpus_per_worker == 0:
        if wanted.choose != "always":
            return None
        from farspan.plan.calibrate import cpu_machine

        return cpu_machine(config.parallel.workers)
    if wanted.gpu is None:
        import torch

        if not torch.cuda.is_available():
            return None
        from farspan.plan.calibrate import this_machine

        return this_machine()
    return named_machine(config, wanted.gpu)


def named_machine(config: RunConfig, gpu: str) -> Machine:
    """As many machines with GPUs of that kind as the workers of a run need."""
    workers, wanted = config.parallel.workers, config.plan
    nodes = -(-workers // wanted.gpus_per_node)
    limit = config.memory.limit_gib or None
    machine = parse_machine(f"{gpu}:{-(-workers // nodes)}", nodes, memory_gib=limit)
    return machine if wanted.calibration is None else calibrated(machine, Path(wanted.calibration))


def task_of(config: RunConfig, model: PretrainedConfig, machine: Machine) -> tuple[Task, Space]:
    """What is planned for a run on `machine`, and what may be chosen."""
    from farspan.plan.exchange import ways_of
    from farspan.plan.trace import trace_model

    profile = trace_model(model)
    workers = config.parallel.workers
    sizes = [n for n in range(1, workers + 1) if workers % n == 0]
    space = Space(optimizers=(config.optim.kind,), lora_rank=config.lora.rank, swap_share=config.memory.swap_share)
    return Task(profile, machine, config.data.sequence_tokens, ways_of(profile, sizes), passes_of(config)), space


def _agrees(choice: Choice, config: RunConfig, written: frozenset[str]) -> bool:
    if choice.num_ranks != config.parallel.workers:
        return False
    settings = choice.settings()
    said = {key: attrgetter(key)(config) for key in settings if key in written}
    left_open = {"parallel.strategy", "memory.offload_activations"}
    return all(
        value == settings[key] or (value == "auto" and key in left_open and settings[key] != "none")
        for key, value in said.items()
    )


def choice_of(config: RunConfig) -> Choice:
    """The config as it is, in the planner's words."""
    parallel, memory = config.parallel, config.memory
    return Choice(
        dp=parallel.workers // parallel.sp,
        sp=parallel.sp,
        strategy=_strategy(parallel),
        ulysses=parallel.ulysses if _strategy(parallel) == "hybrid" else 1,
        engine=config.weights.engine,
        zero=config.weights.zero,
        tiled_mlp=memory.tiled_mlp,
        loss_tile_tokens=config.train.loss_tile_tokens,
        recompute=config.train.recompute,
        offload_activations=memory.offload_activations,
        chunk=memory.chunk,
        chunk_tokens=memory.chunk_tokens if memory.chunk != "none" else 0,
        optimizer=config.optim.kind,
        offload_optimizer=config.weights.offload_optimizer,
        lora_rank=config.lora.rank,
    )


def _strategy(parallel: ParallelConfig) -> str:
    """One process shares nothing, and a group of one or of all makes no hybrid."""
    if (
        parallel.strategy == "auto"
        or parallel.sp == 1
        or (parallel.strategy, parallel.ulysses) == ("hybrid", parallel.sp)
    ):
        return "ulysses"
    return "ring" if (parallel.strategy, parallel.ulysses) == ("hybrid", 1) else parallel.strategy


def _with(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    whole = OmegaConf.structured(config)
    for key, value in settings.items():
        OmegaConf.update(whole, key, value)
    changed = OmegaConf.to_object(whole)
    assert isinstance(changed, RunConfig), "a run config stays one"
    return changed


def _prediction(plan: Plan, config: RunConfig) -> PlanPredicted:
    on_gpu = config.resources.gpus_per_worker > 0
    tensors = sum(size for name, size in plan.footprint.device.items() if name != "allocator slack")
    return PlanPredicted(
        step_s=plan.step_s * config.train.accumulation,
        # The resident set of a process on a CPU holds its libraries too: there is nothing to compare with.
        device_bytes=round(tensors) if on_gpu else 0,
    )


def _lines(plan: Plan, settings: dict[str, Any], config: RunConfig) -> tuple[tuple[str, str], ...]:
    changed = [f"{key}={str(v).lower()}" for key, v in settings.items() if attrgetter(key)(config) != v]
    return (
        ("planner", f"chose {'  '.join(changed)}" if changed else "would choose what the config says"),
        ("predicted", f"{plan.step_s * config.train.accumulation:,.2f} s a step, to be compared with what is measured"),
    )


def _swap(task: Task, plan: Plan, config: RunConfig) -> tuple[tuple[str, str], ...]:
    """What the run is going to measure, as far as it can be said before."""
    if config.memory.swap_share != "auto" or not plan.choice.recompute:
        return ()
    return (("swap", predict_share(task, plan.choice)[1]),)


def as_written(config: RunConfig) -> RunConfig:
    """For a config whose every key is decided: on the cluster it is submitted to, nothing is chosen again."""
    return replace(config, plan=replace(config.plan, choose="never"))
