"""What a run's config, as its record keeps it, says to a report.

The record may be another farspan's: a key that is not there, or is not what it should be, counts as not said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The few keys of a run config that a report reads."""

    name: str = ""
    model: str = ""
    """Its folder, or the architecture of one made from scratch."""
    workers: int = 1
    resume: bool = True
    price_per_worker_hour: float = 0.0
    """0: not said."""


def recorded_run(config: str) -> RecordedRun:
    """Read from `RunStarted.config`."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return RecordedRun()
    workers = _value(tree, "parallel.workers", int)
    price = _value(tree, "resources.price_per_gpu_hour", float)
    return RecordedRun(
        name=_value(tree, "name", str) or "",
        model=_value(tree, "model.source", str) or _value(tree, "model.architecture", str) or "",
        workers=max(workers or 1, 1),
        resume=_value(tree, "train.resume", bool) is not False,
        price_per_worker_hour=max(price or 0.0, 0.0),
    )


def _value(tree: Any, key: str, kind: type) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    if kind is float and type(tree) is int:
        return float(tree)
    return tree if type(tree) is kind else None
