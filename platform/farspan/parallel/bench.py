"""Every strategy on two local processes against DeepSpeed's Ulysses wrapper and against one process.

Shapes: T tokens of the sequence, H query heads, G key/value heads, D head dim.
One process gets as many threads as the others have processes, so all rows use the same cores. Contenders take turns
in every round: a machine whose speed drifts drifts for all. Outputs and gradients are compared with one process before
anything is timed, because a fast wrong answer is not a result.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import ClusterError
from farspan.parallel.documents import attend_documents
from farspan.parallel.layout import ContiguousLayout, Layout
from farspan.parallel.mesh import make_mesh
from farspan.parallel.peak import peak_bytes_of
from farspan.parallel.strategy import STRATEGIES, SequenceParallel, SequenceRanks, bytes_sent
from farspan.parallel.traffic import Block

_NUM_RANKS, _ROUNDS, _DEADLINE_S = 2, 5, 600.0
ONE_PROCESS, PEER = "one process", "deepspeed ulysses"


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One sequence: its documents, and the heads of one layer."""

    bounds: tuple[int, ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


CASES = (BenchCase((0, 4096)), BenchCase((0, 300, 1100, 1101, 2048, 3500, 4096)))


@dataclass
class Contender:
    """One way to compute forward and backward on this rank; `sent` reads its byte counter."""

    name: str
    run: Callable[[], list[Tensor]]
    layout: Layout | None
    sent: Callable[[], int] | None
    formula: int | None


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
    tensors = _make(case)
    peers, reason = _peer(case, tensors)
    contenders = [_one_process(case, tensors), *_ours(case, tensors), *peers]
    want = _alone(case, tensors)
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


def _make(case: BenchCase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads, case.num_q_heads)
    return [torch.randn(case.num_tokens, h, case.head_dim, generator=generator) for h in heads]


def _ours(case: BenchCase, tensors: list[Tensor]) -> list[Contender]:
    block = Block(
        case.num_tokens // _NUM_RANKS, case.num_q_heads, case.num_kv_heads, case.head_dim, case.head_dim, itemsize=4
    )
    contenders = []
    for name in STRATEGIES:
        num_ulysses = _NUM_RANKS if name == "hybrid" else 1
        ranks = SequenceRanks.of(make_mesh("cpu", _NUM_RANKS, num_ulysses))
        sequence = SequenceParallel(ranks, name)
        layout = sequence.lay_out(case.num_tokens, case.bounds)
        attention = sequence.attention(layout, case.bounds)
        held = [layout.take(x, ranks.all.rank) for x in tensors]

        def run(attention: Any = attention, held: list[Tensor] = held) -> list[Tensor]:
            return _with_gradients(lambda q, k, v: attention(q, k, v, scale=case.scale), held)

        def sent(ranks: SequenceRanks = ranks) -> int:
            return ranks.all.bytes_sent

        formula = sum(bytes_sent(name, block, _NUM_RANKS, num_ulysses))
        contenders.append(Contender(name, run, layout, sent, formula))
    return contenders


def _one_process(case: BenchCase, tensors: list[Tensor]) -> Contender:
    """Rank 0 alone with everyone's threads; its partner waits."""

    def run() -> list[Tensor]:
        torch.set_num_threads(_NUM_RANKS)
        try:
            return _alone(case, tensors)
        finally:
            torch.set_num_threads(1)

    def idle() -> list[Tensor]:
        return []

    return Contender(ONE_PROCESS, run if dist.get_rank() == 0 else idle, None, None, None)


def _alone(case: BenchCase, tensors: list[Tensor]) -> list[Tensor]:
    return _with_gradients(lambda q, k, v: attend_documents(q, k, v, case.bounds, case.scale), tensors)


def _peer(case: BenchCase, tensors: list[Tensor]) -> tuple[list[Contender], str]:
    """DeepSpeed's wrapper around torch's attention, or why it is not measured."""
    if len(case.bounds) > 2:
        return [], "its wrapper does not know documents: they would attend to each other"
    if importlib.util.find_spec("deepspeed") is None:
        return [], "deepspeed is not installed; pip install 'farspan[deepspeed]'"
    problem = _start_deepspeed()
    if problem is not None:
        return [], problem
    from deepspeed.sequence.layer import DistributedAttention

    layout = ContiguousLayout(case.num_tokens, _NUM_RANKS)
    held = [layout.take(x, dist.get_rank()).unsqueeze(0) for x in tensors]

    def local(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()

    wrapper = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def run() -> list[Tensor]:
        return [x[0] for x in _with_gradients(lambda q, k, v: wrapper(q, k, v, 0), held)]

    numbers = sum(x.numel() for x in held) // _NUM_RANKS
    return [Contender(PEER, run, layout, None, 2 * numbers * 4 * (_NUM_RANKS - 1))], ""


def _start_deepspeed() -> str | None:
    """Why DeepSpeed could not start on every rank; it compiles an extension first, which may fail."""
    problem = None
    try:
        with warnings.catch_warnings(action="ignore"):
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    except Exception as found:
        problem = f"{type(found).__name__}: {found}".splitlines()[0]
    # A contender runs on all ranks or on none: a rank that is ready must not wait for one that is not.
    failed = torch.tensor(0.0 if problem is None else 1.0)
    dist.all_reduce(failed)
    return (problem or "deepspeed did not start on the other rank") if failed > 0 else None


def _with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


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
    before = contender.sent()
    contender.run()
    found = contender.sent() - before
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
