"""Our attention beside its peers: the same tensors, the same run, checked before it is timed.

Contestants take turns in every round, so that a machine whose speed drifts drifts for all; a ratio is the median of
the rounds' ratios. torch's SDPA computes packed documents one call each, and a window with its mask written out.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.backend import Backend
from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.kernels.attention.peers import Contestant, Work, ours, peers_on

# Rounds of a case: at least three; more while this many seconds last.
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 15, 2.0
# A mask written out beyond this many bytes is no peer, it is an out-of-memory error.
_LARGEST_MASK_BYTES = 4 * 1024**3
# Largest relative difference from SDPA that two correct kernels show.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Case:
    tokens: int
    dtype: torch.dtype
    window: int | None = None
    packed: bool = False

    @property
    def pattern(self) -> str:
        return "packed" if self.packed else "causal" if self.window is None else f"window {self.window}"


_CPU_CASES = (
    *(Case(tokens, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (2048, 4096)),
    *(Case(8192, dtype, window=1024) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(16384, dtype, packed=True) for dtype in (torch.float32, torch.bfloat16)),
    Case(16384, torch.bfloat16),
)
_CUDA_CASES = tuple(
    Case(tokens, torch.bfloat16, window, packed)
    for tokens in (8192, 32768, 131072)
    for window, packed in ((None, False), (4096, False), (None, True))
)


def bench_attention(cases: tuple[Case, ...] | None = None, backend: Backend | None = None) -> list[dict[str, Any]]:
    """One row per case, peer and direction: median seconds of both and ours as a ratio of the peer's (below 1 wins).

    A row whose results disagree says so in `wrong` and carries no time. `backend`: ours, by default the one that
    would be chosen for this machine's device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for case in cases or (_CPU_CASES if device.type == "cpu" else _CUDA_CASES):
        work = _work(case, device)
        rows += _rows(case, work, backend or choose_backend(Ask.of(work.q_THD, work.v_TGD)))
    return rows


def _work(case: Case, device: torch.device) -> Work:
    heads, groups, dim = (4, 2, 64) if device.type == "cpu" else (32, 8, 128)
    generator = torch.Generator().manual_seed(0)
    sizes = ((case.tokens, heads, dim), (case.tokens, groups, dim), (case.tokens, groups, dim))
    q, k, v, dout = (
        torch.randn(size, generator=generator).to(device, case.dtype) for size in (*sizes, (case.tokens, heads, dim))
    )
    bounds = document_bounds(case.tokens) if case.packed else (0, case.tokens)
    return Work(q, k, v, dout, bounds, case.window)


def document_bounds(tokens: int) -> tuple[int, ...]:
    """Documents whose lengths have the long tail of real ones: most are short, a few hold most of the tokens."""
    chosen = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(max(int(chosen.lognormvariate(6.0, 1.3)), 1), tokens - sum(lengths)))
    return (0, *accumulate(lengths))


def _rows(case: Case, work: Work, backend: Backend) -> list[dict[str, Any]]:
    ours_here = ours(backend, work)
    peers = [make(work) for make in peers_on(work.q_THD.device, case.dtype) if _fits(case, make)]
    if not peers:
        return []
    shape = {
        "pattern": case.pattern,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "heads": f"{work.q_THD.shape[1]}:{work.k_TGD.shape[1]}",
    }
    first = ours_here.backward(ours_here.forward())
    theirs = [peer.backward(peer.forward()) for peer in peers]
    times = _times([ours_here, *peers])
    rows = []
    for index, (peer, their) in enumerate(zip(peers, theirs, strict=True), start=1):
        error = max(relative_error(a, b) for a, b in zip(first, their, strict=True))
        for direction in ("forward", "backward"):
            row = {**shape, "direction": direction, "ours": ours_here.name, "peer": peer.name, "error": error}
            # Not below: a NaN is no success.
            if not error < _TOLERANCE[case.dtype]:
                rows.append({**row, "wrong": f"results differ by {error:.2g}; allowed {_TOLERANCE[case.dtype]:.2g}"})
                continue
            mine, other = times[direction][0], times[direction][index]
            ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
            rows.append({**row, "ours_s": statistics.median(mine), "peer_s": statistics.median(other), "ratio": ratio})
    return rows


def _fits(case: Case, make: Callable[[Work], Contestant]) -> bool:
    return case.window is None or make.__name__ != "sdpa" or case.tokens**2 <= _LARGEST_MASK_BYTES


def _times(contestants: list[Contestant]) -> dict[str, list[list[float]]]:
    """Seconds of every round per contestant, by direction."""
    times: dict[str, list[list[float]]] = {
        direction: [[] for _ in contestants] for direction in ("forward", "backward")
    }
    end = time.perf_counter() + _SECONDS
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for index, contestant in enumerate(contestants):
            made, seconds = _timed(contestant.forward)
            times["forward"][index].append(seconds)
            _, seconds = _timed(lambda made=made, back=contestant.backward: back(made))  # type: ignore[misc]
            times["backward"][index].append(seconds)
    return times


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    started = time.perf_counter()
    result = run()
    _wait()
    return result, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
