"""Local gloo processes for one question: started, given a deadline, and always ended.

Answers come back through pipes that only these processes hold.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from farspan.errors import FarspanError, PlanError

_END_S = 10.0


def ask_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, deadline_s: float) -> list[Any]:
    """`[function(*args) on rank 0, ..., on rank n-1]`, each inside one gloo process group.

    Raises:
        PlanError: a rank died, raised, or did not answer in time; every process has been ended.
    """
    context = get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="farspan-ranks-") as scratch:
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                given = (theirs, rank, num_ranks, f"{scratch}/store", deadline_s, function, args)
                process = context.Process(target=_serve, args=given, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, deadline_s)
        finally:
            _end(processes)
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], deadline_s: float) -> list[Any]:
    answers: dict[int, Any] = {}
    until = time.monotonic() + deadline_s
    while len(answers) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(open_pipes, timeout=max(0.0, until - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - answers.keys())
            raise PlanError(f"ranks {missing} gave no answer in {deadline_s:g} s; close other work or allow more time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            answers[rank] = _received(pipes[rank], rank)
    return [answers[rank] for rank in range(len(pipes))]


def _received(pipe: Connection, rank: int) -> Any:
    try:
        problem, value = pipe.recv()
    except EOFError:
        raise PlanError(f"rank {rank} died; look for an out-of-memory message of the system") from None
    pipe.send(None)
    if isinstance(problem, FarspanError):
        raise problem
    if problem is not None:
        raise PlanError(f"rank {rank} failed: {problem}")
    return value


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=_END_S)
        if process.is_alive():
            process.kill()
            process.join(timeout=_END_S)


def _serve(
    pipe: Connection, rank: int, num_ranks: int, store: str, deadline_s: float, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=deadline_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timeout)
    answer: tuple[Any, Any]
    try:
        answer = None, function(*args)
    except FarspanError as problem:
        answer = problem, None
    except Exception:
        answer = traceback.format_exc(), None
    dist.destroy_process_group()
    pipe.send(answer)
    # Tensors travel as shared memory of this process: it must live until they were taken.
    with contextlib.suppress(EOFError):
        pipe.recv()
