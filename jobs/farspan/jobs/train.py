"""The training job: a Ray Train TorchTrainer around `farspan.train`, local or inside a cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group

from farspan.config.load import dump_config, parse_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError, FarspanError
from farspan.jobs.progress import EventSender, EventWatcher
from farspan.storage.door import open_store
from farspan.storage.paths import join_uri
from farspan.telemetry.events import EventBody, PlanPredicted, RunStarted
from farspan.train.attempts import run_until_it_fits
from farspan.train.build import build
from farspan.train.limit import memory_limit
from farspan.train.loop import train


def run_training(
    config: RunConfig,
    plan_lines: list[tuple[str, str]],
    tell: Callable[[EventBody], None],
    predicted: PlanPredicted | None = None,
) -> str:
    """Run the job on the Ray this process is connected to; gives the URI of the published model.

    Raises:
        FarspanError: what stopped the run, as the worker raised it.
    """
    plan = "\n".join(f"{what}: {text}" for what, text in plan_lines)
    tell(RunStarted(config=dump_config(config), plan=plan))
    if predicted is not None:
        tell(predicted)
    return run_until_it_fits(config, _run_once, tell)


def _run_once(config: RunConfig, tell: Callable[[EventBody], None]) -> str:
    with EventWatcher(tell) as watcher:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": dump_config(config), "mailbox": watcher.mailbox},
            scaling_config=_scaling(config),
            torch_config=TorchConfig(backend=_backend(config), timeout_s=int(config.resources.timeout_s)),
            run_config=_ray_run(config),
        )
        _wait_for_room(config)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as problem:
            raise _cause(problem) from None
    return f"{config.output.rstrip('/')}/model"


def train_worker(payload: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    config = parse_config(RunConfig, payload["config"])
    gpu = config.resources.gpus_per_worker > 0
    device = ray.train.torch.get_device() if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    sender = EventSender(payload["mailbox"])
    is_first = ray.train.get_context().get_world_rank() == 0
    with tempfile.TemporaryDirectory(prefix="farspan-cache-") as cache:
        training = build(config, device, Path(cache))
        with memory_limit(device, config.memory.limit_gib):
            train(training, config, sender if is_first else lambda event: None)
    sender.close()


def _wait_for_room(config: RunConfig) -> None:
    """Wait until every worker fits: Ray Train itself would wait for ever, and say nothing.

    Raises:
        ClusterError: they do not fit within resources.timeout_s.
    """
    wanted = _worker_resources(config)
    group = placement_group([wanted] * config.parallel.workers)
    try:
        if not group.wait(timeout_seconds=config.resources.timeout_s):
            has = {name: ray.cluster_resources().get(name, 0) for name in wanted}
            raise ClusterError(
                f"no room for {config.parallel.workers} workers of {wanted} within resources.timeout_s="
                f"{config.resources.timeout_s:g}; the cluster has {has} in all; ask for fewer, or add nodes"
            )
    finally:
        remove_placement_group(group)


def _worker_resources(config: RunConfig) -> dict[str, float]:
    gpus = config.resources.gpus_per_worker
    return {"CPU": config.resources.cpus_per_worker, **({"GPU": gpus} if gpus > 0 else {})}


def _scaling(config: RunConfig) -> ScalingConfig:
    return ScalingConfig(
        num_workers=config.parallel.workers,
        use_gpu=config.resources.gpus_per_worker > 0,
        resources_per_worker=_worker_resources(config),
    )


def _backend(config: RunConfig) -> str:
    return "nccl" if config.resources.gpus_per_worker > 0 else "gloo"


def _ray_run(config: RunConfig) -> RayRunConfig:
    # Ray Train keeps its own state beside the run; every node must reach it.
    files, path = open_store(join_uri(config.output, "ray")).arrow
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return RayRunConfig(
        name=name, storage_path=path, storage_filesystem=files, failure_config=FailureConfig(controller_failure_limit=3)
    )


def _cause(problem: BaseException) -> FarspanError:
    """The error a worker raised on purpose, dug out of what Ray wrapped around it."""
    seen: list[BaseException] = [problem]
    while seen:
        current = seen.pop()
        if isinstance(current, FarspanError):
            return current
        seen.extend(getattr(current, "worker_failures", {}).values())
        seen.extend(e for e in (current.__cause__, current.__context__, getattr(current, "cause", None)) if e)
    return ClusterError(f"training failed: {problem}")
