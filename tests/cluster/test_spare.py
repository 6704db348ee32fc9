"""Who takes a worker's place begins in a process that was there before and has imported what a worker imports."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import psutil
import pytest
import ray
from tests.support.runs import tiny_run

from farspan.jobs.spare import ask_for_spare, spare_environment

_PATIENCE_S = 180.0


class _Worker:
    def ask(self) -> None:
        ask_for_spare()

    def found(self) -> tuple[int, bool]:
        """Its process, and whether that has what training needs."""
        return os.getpid(), "farspan.train.build" in sys.modules


class _Controller:
    """Starts workers, which have its environment beside their own, as Ray Train's do."""

    def __init__(self) -> None:
        self._worker: Any = None

    def start(self, environment: dict[str, Any]) -> None:
        self._worker = ray.remote(num_cpus=1, runtime_env=environment)(_Worker).remote()

    def found(self) -> tuple[int, bool]:
        found: tuple[int, bool] = ray.get(self._worker.found.remote(), timeout=_PATIENCE_S)
        return found

    def ask(self) -> None:
        ray.get(self._worker.ask.remote(), timeout=_PATIENCE_S)

    def kill(self) -> None:
        ray.kill(self._worker)


@pytest.mark.usefixtures("ray_cluster")
def test_the_next_worker_takes_the_process_that_was_asked_for() -> None:
    config = tiny_run("corpus", "output", "parallel.workers=2", "parallel.min_workers=1")
    environment = spare_environment(config, {})
    made = ray.remote(num_cpus=0, runtime_env={"env_vars": {"OF_ITS_CONTROLLER": "1"}})(_Controller).remote()
    ray.get(made.start.remote(environment), timeout=_PATIENCE_S)
    pid, imported = ray.get(made.found.remote(), timeout=_PATIENCE_S)
    assert imported
    asked_s = time.time()
    ray.get(made.ask.remote(), timeout=_PATIENCE_S)
    spare = _idle_since(asked_s, psutil.Process(pid).ppid())
    ray.get(made.kill.remote(), timeout=_PATIENCE_S)
    ray.get(made.start.remote(environment), timeout=_PATIENCE_S)
    assert ray.get(made.found.remote(), timeout=_PATIENCE_S) == (spare, True) != (pid, True)
    ray.get(made.kill.remote(), timeout=_PATIENCE_S)
    ray.kill(made)


def _idle_since(moment_s: float, node: int) -> int:
    """The process of this node of Ray's that waits for work and began after `moment_s`."""
    ends = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends:
        for process in psutil.process_iter(["pid", "ppid", "cmdline", "create_time"]):
            words = process.info["cmdline"] or [""]
            ours = process.info["ppid"] == node and process.info["create_time"] > moment_s - 1
            if ours and words[0].startswith("ray::IDLE"):
                return int(process.info["pid"])
        time.sleep(0.1)
    raise AssertionError(f"no idle process in {_PATIENCE_S:g} s")
