"""What each worker of Ray Train runs.

Ray Train's controller reads this function too, and it has no use for what training needs: that is imported inside.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def train_worker(payload: dict[str, Any]) -> None:
    """Train as `payload` says: the config, the plan, and the mailbox that events go to."""
    import ray.train
    import ray.train.torch
    import torch

    from farspan.config.load import parse_config
    from farspan.config.schema import RunConfig
    from farspan.jobs.progress import EventSender, SilentRank
    from farspan.jobs.spare import ask_for_spare, with_spare
    from farspan.train.build import build
    from farspan.train.limit import memory_limit
    from farspan.train.loop import train

    config = parse_config(RunConfig, payload["config"])
    gpu = config.resources.gpus_per_worker > 0
    device = ray.train.torch.get_device() if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    is_first = ray.train.get_context().get_world_rank() == 0
    outside = EventSender(payload["mailbox"]) if is_first else SilentRank()
    tell = with_spare(outside, ask_for_spare) if payload["spare"] else outside
    with tempfile.TemporaryDirectory(prefix="farspan-cache-") as cache:
        training = build(config, device, Path(cache))
        training.plan = payload["plan"]
        with memory_limit(device, config.memory.limit_gib):
            train(training, config, tell, outside)


def import_training() -> None:
    """Import the most of what a worker will, where there is nothing to train yet."""
    # What cannot be imported is the worker's to tell of.
    with suppress(Exception):
        import farspan.jobs.progress
        import farspan.jobs.room
        import farspan.train.build
        import farspan.train.loop  # noqa: F401
