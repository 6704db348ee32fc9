"""`farspan train --cluster`: what the run will need on the cluster's own nodes, and then its submission."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from farspan.cli.choose import Chosen, as_written, choice_of, choose_plan, named_machine, task_of
from farspan.cli.train import model_of, plan_of, print_plan, read_run_config
from farspan.cluster.nodes import Cluster, Node, no_memory, no_room
from farspan.cluster.placement import Ask, asks_of_run, room_in, training_bundle
from farspan.config.load import dump_config, written_keys
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError
from farspan.plan.cost import overflow, plan_of_choice
from farspan.plan.explain import breaks_first, seconds
from farspan.plan.machine import GIB, Machine, sheet_of, size_text
from farspan.plan.search import limit_of
from farspan.plan.states import states_of
from farspan.plan.swap import with_share

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Lines = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Target:
    """What the workers get. `machine` is none where nobody knows."""

    machine: Machine | None
    source: str
    """Whose word that is."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is predicted to need, for a reader, and what each worker certainly holds: bytes."""

    lines: Lines
    device_bytes: float = 0.0
    host_bytes: float = 0.0


def submit_run(path: str, overrides: list[str], address: str, *, dry_run: bool) -> None:
    """Say what a run will need, refuse what can never run there, submit it and follow its log.

    Raises:
        ConfigError: the cluster's nodes have no room for it, or cannot reach its folders.
    """
    from farspan.jobs.facts import ask_cluster

    config = read_run_config(path, overrides)
    if not dry_run:
        _refuse_unreachable(config, address)
    model = model_of(config)
    with Console(stderr=True).status("asking the cluster and predicting"):
        cluster = ask_cluster(address)
        target = target_of(config, cluster)
        chosen = _choose(config, written_keys(path, overrides), model, target)
        plan = plan_of(chosen.config)
        config = chosen.config
        config.parallel = plan.parallel
        forecast = foresee(config, model, target)
    obstacles = list(obstacles_of(config, cluster, forecast))
    if dry_run:
        typer.echo(dump_config(config), nl=False)
    print_plan([*plan.lines(), *chosen.lines, *forecast.lines, *_waits(obstacles, cluster, config)])
    if obstacles and cluster is not None and cluster.grows is False:
        raise obstacles[0]
    if not dry_run:
        _submit(as_written(config), address)


def target_of(config: RunConfig, cluster: Cluster | None) -> Target:
    """The machine the workers get: what the config says, else what the cluster's nodes say, else an assumption."""
    on_gpu = config.resources.gpus_per_worker > 0
    if on_gpu and config.plan.gpu is not None:
        machine = named_machine(config, config.plan.gpu)
        return Target(machine, f"plan.gpu={config.plan.gpu}, as the config says; not asked of the cluster")
    asked = None if cluster is None else _asked_machine(config, cluster)
    if asked is not None:
        return asked
    why = "the cluster does not say what its nodes have" if cluster is None else "no node says what it has"
    if on_gpu:
        return Target(None, f"not known: {why} that a data sheet is known of; name the GPU with plan.gpu=h100")
    from farspan.plan.calibrate import cpu_machine

    return Target(cpu_machine(config.parallel.workers), f"assumed: {why}; memory and speeds are this machine's")


def _asked_machine(config: RunConfig, cluster: Cluster) -> Target | None:
    """Of the nodes that have room, as many as are needed, each like the one with the least memory."""
    bundle, workers = training_bundle(config.resources), config.parallel.workers
    fitting = [node for node in cluster.with_room(bundle) if node.memory_bytes is not None] or [
        node for node in cluster.nodes if node.memory_bytes is not None
    ]
    if config.resources.gpus_per_worker > 0:
        return _gpu_machine(config, [node for node in fitting if node.gpu is not None])
    if not fitting:
        return None
    from farspan.plan.calibrate import cpu_machine

    least = min(fitting, key=lambda node: node.memory_bytes or 0.0)
    num_nodes, on_each = _spread(fitting, bundle, workers)
    here = cpu_machine(on_each)
    device = replace(here.device, bytes=(least.memory_bytes or 0.0) / on_each)
    machine = replace(here, device=device, nodes=num_nodes)
    return Target(machine, f"memory as {_named(fitting)} say; speeds are assumed: those of this machine")


def _gpu_machine(config: RunConfig, nodes: list[Node]) -> Target | None:
    if not nodes:
        return None
    least = min(nodes, key=lambda node: node.gpu_bytes or 0.0)
    sheet = sheet_of(least.gpu or "", least.gpu_bytes)
    if sheet is None:
        return None
    size = least.gpu_bytes or sheet.bytes
    if config.memory.limit_gib:
        size = min(size, config.memory.limit_gib * GIB)
    num_nodes, on_each = _spread(nodes, training_bundle(config.resources), config.parallel.workers)
    machine = Machine(
        device=replace(sheet, bytes=size),
        devices_per_node=on_each,
        nodes=num_nodes,
        host_bytes=min(node.memory_bytes or 0.0 for node in nodes),
    )
    memory = "memory" if least.gpu_bytes else "kind of GPU"
    return Target(machine, f"{memory} as {_named(nodes)} say; speeds are assumed shares of the data sheet")


def _spread(nodes: list[Node], bundle: dict[str, float], workers: int) -> tuple[int, int]:
    """(nodes, workers on each): Ray fills a node before it begins another."""
    room = max(1, *(room_in(node.resources, bundle) for node in nodes))
    num_nodes = -(-workers // room)
    return num_nodes, -(-workers // num_nodes)


def _named(nodes: list[Node]) -> str:
    return f"the cluster's nodes ({len(nodes)} with room)"


def _choose(config: RunConfig, written: frozenset[str], model: PretrainedConfig, target: Target) -> Chosen:
    wanted = config.plan.choose
    if wanted == "never" or target.machine is None or (config.resources.gpus_per_worker == 0 and wanted != "always"):
        return Chosen(config)
    return choose_plan(config, written, model, target.machine)


def foresee(config: RunConfig, model: PretrainedConfig, target: Target) -> Forecast:
    """Peak memory, seconds of a step and what breaks first, for the config as it is."""
    lines = [("machine", target.source)]
    if target.machine is None:
        return Forecast(lines)
    lines[0] = ("machine", f"{target.machine.text()} ({target.source})")
    task, _ = task_of(config, model, target.machine)
    choice = with_share(task, choice_of(config), config.memory.swap_share)
    states = states_of(task.profile, choice)
    plan = plan_of_choice(task, choice)
    peak, limit = size_text(plan.footprint.device_bytes), size_text(plan.device_limit)
    lines += [
        ("step", f"{seconds(plan.step_s * config.train.accumulation)} predicted"),
        ("peak memory", f"{peak} of {limit} per process predicted ({plan.footprint.moment})"),
        ("breaks first", breaks_first(limit_of(task, choice))),
    ]
    if (over := overflow(task, choice)) is not None:
        lines.append(("warning", f"it is not predicted to fit: {over}"))
    return Forecast(lines, states.fixed, states.host)


def obstacles_of(config: RunConfig, cluster: Cluster | None, forecast: Forecast) -> Iterator[ConfigError]:
    """Why the run can never begin on the nodes that are there."""
    if cluster is None:
        return
    (ask,) = asks_of_run(config)
    if (found := no_room(cluster, ask)) is not None:
        yield found
        return
    # With as many as it may have each holds the least.
    most = Ask(ask.field, config.parallel.workers, ask.bundle)
    found = no_memory(cluster.with_room(ask.bundle), most, forecast.device_bytes, forecast.host_bytes)
    if found is not None:
        yield found


def _waits(obstacles: list[ConfigError], cluster: Cluster | None, config: RunConfig) -> Lines:
    """What is only told, because nodes may be added."""
    if not obstacles or cluster is None or cluster.grows is False:
        return []
    may = "its autoscaler may add nodes" if cluster.grows else "it does not say whether nodes are added"
    return [("warning", f"{obstacles[0]}; {may}: it waits resources.timeout_s={config.resources.timeout_s:g} for them")]


def _refuse_unreachable(config: RunConfig, address: str) -> None:
    from farspan.jobs.submit import is_this_machine

    places = {"output": config.output, "data.corpus": config.data.corpus}
    if config.train.certificate is not None:
        places["train.certificate"] = config.train.certificate
    if config.memory.speeds is not None:
        places["memory.speeds"] = config.memory.speeds
    for field, uri in places.items():
        if "://" not in uri and not is_this_machine(address):
            raise ConfigError(field, "must be reachable from the cluster", uri, "use s3://BUCKET/PATH")


def _submit(config: RunConfig, address: str) -> None:
    from farspan.jobs.submit import follow, submit_training

    submitted = submit_training(config, address)
    typer.echo(f"submitted {submitted.job_id} to {address}")
    follow(submitted, typer.echo)
