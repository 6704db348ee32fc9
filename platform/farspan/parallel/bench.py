"""Every strategy on two local processes against DeepSpeed's Ulysses wrapper and against one process.

Shapes: T tokens of the sequence, H query heads, G key/value heads, D head dim.
One process gets as many threads as the others have processes, so all rows use the same cores. Contenders take turns
in every round: a machine whose speed drifts drifts for all. Outputs and gradients are compared with one process before
anything is timed, because a fast wrong answer is not a result.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import ClusterError
from farspan.kernels.peak import peak_bytes_of
from farspan.parallel.contenders import (
    ONE_PROCESS,
    PEER,
    BenchCase,
    Contender,
    attend_alone,
    make_tensors,
    one_process,
    our_contenders,
    peer_contenders,
)

logger = logging.getLogger(__name__)

_NUM_RANKS, _ROUNDS, _DEADLINE_S = 2, 5, 600.0
CASES = (BenchCase((0, 4096)), BenchCase((0, 2048), num_kv_heads=8), BenchCase((0, 300, 1100, 1101, 2048, 3500, 4096)))


def bench_parallel(cases: tuple[BenchCase, ...] = CASES, rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """One row per case and contender: median seconds of forward and backward, bytes, peak memory.

    Raises:
        ClusterError: a process died, disagreed with one process, or did not end in time.
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="farspan-bench-") as scratch:
        pipes, processes = [], []
        try:
            for rank in range(_NUM_RANKS):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main, args=(theirs, rank, f"{scratch}/store", cases, rounds), daemon=True
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            logger.info("%d cases on %d processes", len(cases), _NUM_RANKS)
            return _collect(pipes)
        finally:
            for process in processes:
                process.terminate()
                process.join(timeout=30)
                if process.is_alive():
                    process.kill()
                    process.join(timeout=30)


def _collect(pipes: list[Connection]) -> list[dict[str, Any]]:
    """The rows of rank 0, once every rank has answered."""
    answers: dict[int, Any] = {}
    until = time.monotonic() + _DEADLINE_S
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise ClusterError(f"bench parallel: ranks {sorted(waiting.values())} did not answer in {_DEADLINE_S:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answers[waiting[pipe]] = pipe.recv()
            except EOFError:
                answers[waiting[pipe]] = "the process died"
        failed = [f"rank {rank}: {answer}" for rank, answer in answers.items() if isinstance(answer, str)]
        if failed:
            raise ClusterError(f"bench parallel: {'; '.join(failed)}")
    return list(answers[0])


def _rank_main(pipe: Connection, rank: int, store: str, cases: tuple[BenchCase, ...], rounds: int) -> None:
    # Libraries that log to standard output would end up between the rows of --json.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=_NUM_RANKS,
            timeout=timedelta(seconds=_DEADLINE_S),
        )
        try:
            pipe.send([row for case in cases for row in _bench_case(case, rounds)])
        finally:
            dist.destroy_process_group()
    except Exception as problem:
        pipe.send(f"{type(problem).__name__}: {problem}")


def _bench_case(case: BenchCase, rounds: int) -> list[dict[str, Any]]:
    tensors = make_tensors(case)
    peers, reason = peer_contenders(case, tensors)
    contenders = [one_process(case, tensors), *our_contenders(case, tensors), *peers]
    want = attend_alone(case, tensors)
    errors = {c.name: _agree(c, want) for c in contenders}
    sent = {c.name: _bytes_of_one_run(c) for c in contenders}
    peaks = {c.name: _measured(c, peak_bytes_of) for c in contenders}
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            seconds[contender.name].append(_measured(contender, _seconds))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[dict[str, Any]] = [
        {
            "strategy": c.name,
            "documents": len(case.bounds) - 1,
            "tokens": case.num_tokens,
            "heads": f"{case.num_q_heads}:{case.num_kv_heads}",
            "seconds": medians[c.name],
            "to_one_process": medians[c.name] / medians[ONE_PROCESS],
            "bytes_sent": sent[c.name],
            "bytes_formula": c.formula,
            "peak_bytes": peaks[c.name],
            "worst_error": errors[c.name],
        }
        for c in contenders
    ]
    return rows if peers else [*rows, {"strategy": PEER, "documents": len(case.bounds) - 1, "not_measured": reason}]


def _agree(contender: Contender, want: list[Tensor]) -> float:
    """Worst relative error of this rank's part of out and gradients against one process."""
    if contender.layout is None:
        return 0.0
    rank = dist.get_rank()
    wanted = [contender.layout.take(x, rank) for x in want]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(contender.run(), wanted, strict=True))
    assert worst < 1e-4, f"{contender.name} and one process disagree by {worst}"
    return worst


def _bytes_of_one_run(contender: Contender) -> int | None:
    if contender.sent is None:
        return None
    found = contender.sent()
    assert found == contender.formula, f"{contender.name} sent {found} bytes, its formula says {contender.formula}"
    return found


def _measured(contender: Contender, measure: Callable[[Callable[[], object]], Any]) -> Any:
    """What this rank measures between two barriers, so that no rank pays for another's turn."""
    dist.barrier()
    found = measure(contender.run)
    dist.barrier()
    return found


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
