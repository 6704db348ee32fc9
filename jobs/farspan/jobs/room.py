"""Room for workers on a cluster."""

from __future__ import annotations

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from farspan.config.schema import RunConfig
from farspan.errors import ClusterError


def wait_for_room(config: RunConfig) -> None:
    """Wait until every worker fits: Ray Train itself would wait for ever, and say nothing.

    Raises:
        ClusterError: they do not fit within resources.timeout_s.
    """
    if fits(config, config.parallel.workers, config.resources.timeout_s):
        return
    wanted = worker_resources(config)
    has = {name: ray.cluster_resources().get(name, 0) for name in wanted}
    raise ClusterError(
        f"no room for {config.parallel.workers} workers of {wanted} within resources.timeout_s="
        f"{config.resources.timeout_s:g}; the cluster has {has} in all; ask for fewer, or add nodes"
    )


def fits(config: RunConfig, num_workers: int, timeout_s: float) -> bool:
    """Whether so many workers find room within `timeout_s`."""
    if num_workers == 0:
        return True
    group = placement_group([worker_resources(config)] * num_workers)
    try:
        return bool(group.wait(timeout_seconds=timeout_s))
    finally:
        remove_placement_group(group)


def worker_resources(config: RunConfig) -> dict[str, float]:
    """What one worker asks Ray for."""
    gpus = config.resources.gpus_per_worker
    return {"CPU": config.resources.cpus_per_worker, **({"GPU": gpus} if gpus > 0 else {})}
