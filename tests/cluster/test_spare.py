"""Who takes a worker's place begins in a process that was there before and has imported what a worker imports."""

from __future__ import annotations

import os
import sys
import time

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


@pytest.mark.usefixtures("ray_cluster")
def test_the_next_worker_takes_the_process_that_was_asked_for() -> None:
    config = tiny_run("corpus", "output", "parallel.workers=2", "parallel.min_workers=1")
    environment = spare_environment(config, {})
    worker = ray.remote(num_cpus=1, runtime_env=environment)(_Worker)
    first = worker.remote()
    pid, imported = ray.get(first.found.remote(), timeout=_PATIENCE_S)
    assert imported
    asked_s = time.time()
    ray.get(first.ask.remote(), timeout=_PATIENCE_S)
    spare = _idle_since(asked_s)
    ray.kill(first)
    second = worker.remote()
    assert ray.get(second.found.remote(), timeout=_PATIENCE_S) == (spare, True) != (pid, True)
    ray.kill(second)


def _idle_since(moment_s: float) -> int:
    """The process of Ray's that waits for work and began after `moment_s`."""
    ends = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends:
        for process in psutil.process_iter(["pid", "cmdline", "create_time"]):
            words = process.info["cmdline"] or [""]
            if words[0].startswith("ray::IDLE") and process.info["create_time"] > moment_s - 1:
                return int(process.info["pid"])
        time.sleep(0.1)
    raise AssertionError(f"no idle process in {_PATIENCE_S:g} s")
