"""One pool of gloo ranks for the whole test session: processes are started once, groups are made for each call.

A test hands over an importable function; it runs on ranks 0..n-1, each inside a fresh default process group of n.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.support.forking import forking

_START_S = 180.0


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


@dataclass
class _Rank:
    process: BaseProcess
    pipe: Connection


class RankPool:
    """Up to `num_ranks` processes, started when first needed and restarted after one dies or hangs."""

    def __init__(self, num_ranks: int, *, fresh: bool = False) -> None:
        """`fresh`: processes that inherit nothing, not the order of sets either; each imports everything itself."""
        self._num_ranks, self._fresh = num_ranks, fresh
        self._ranks: list[_Rank] = []
        # Kept as long as the processes: a store whose folder is gone ends its process when it is collected.
        self._scratch = tempfile.TemporaryDirectory(prefix="farspan-ranks-")
        self._calls = 0

    def run(self, function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
        """`[function(*args) on rank 0, ..., on rank n-1]`."""
        assert num_ranks <= self._num_ranks
        if not all(rank.process.is_alive() for rank in self._ranks):
            self._end_processes()
        self._start(num_ranks)
        self._calls += 1
        for rank in range(num_ranks):
            self._ranks[rank].pipe.send((function, rank, num_ranks, f"{self._scratch.name}/{self._calls}", args))
        return self._collect(num_ranks, timeout_s)

    def close(self) -> None:
        """End every process and remove what they shared."""
        self._end_processes()
        self._scratch.cleanup()

    def _end_processes(self) -> None:
        for rank in self._ranks:
            rank.process.terminate()
        for rank in self._ranks:
            rank.process.join(timeout=30)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join(timeout=30)
            rank.pipe.close()
        self._ranks.clear()

    def _start(self, num_ranks: int) -> None:
        context = get_context("spawn") if self._fresh else forking()
        for _ in range(len(self._ranks), num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def _collect(self, num_ranks: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {self._ranks[rank].pipe: rank for rank in range(num_ranks)}
        # The first call also pays for starting the processes and importing torch in them.
        deadline_s = timeout_s + _START_S
        while waiting:
            ready = wait(list(waiting), timeout=deadline_s)
            if not ready:
                self._end_processes()
                raise RankFailed(f"ranks {sorted(waiting.values())} gave no answer in {deadline_s:.0f} s; {failures}")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    good, value = False, "the process died"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
            if failures:
                # Its partners may wait for it for ever: a pool with a failed rank is thrown away.
                self._end_processes()
                raise RankFailed("\n".join(failures))
        return [results[rank] for rank in range(num_ranks)]


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, num_ranks, store, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{Path(store)}",
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=120),
            )
            try:
                pipe.send((True, function(*args)))
            finally:
                dist.destroy_process_group()
        except BaseException:
            pipe.send((False, traceback.format_exc()))
