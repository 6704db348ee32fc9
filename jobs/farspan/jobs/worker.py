"""What each worker of Ray Train runs.

Ray Train's controller reads this function too, and it has no use for what training needs: that is imported inside.
"""

from __future__ import annotations

import tempfile
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
    with tempfile.TemporaryDirectory(prefix="farspan-cache-") as cache:
        training = build(config, device, Path(cache))
        training.plan = payload["plan"]
        with memory_limit(device, config.memory.limit_gib):
            train(training, config, outside, outside)
