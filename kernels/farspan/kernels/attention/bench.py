"""Our attention beside its peers: the same tensors, the same run, checked before it is timed.

Contestants (each of our backends that computes the case here, and each peer) take turns in every round, so that a
machine whose speed drifts drifts for all; a ratio is the median of the rounds' ratios. torch's SDPA computes packed
documents one call each, and a window with its mask written out.
"""

from __future__ import annotations

import logging
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
from farspan.kernels.attention.dispatch import installed_backends
from farspan.kernels.attention.limits import Ask
from farspan.kernels.attention.peers import Contestant, Work, ours, peers_on
from farspan.kernels.peak import peak_bytes_of

logger = logging.getLogger(__name__)

# Rounds of a case: at least three; more while this many seconds last.
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 3, 15, 2.0
_LONGEST_TILED = 4096
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
    """One row per case, direction and contestant: median seconds, and them as a ratio of the fastest peer's.

    A row whose results disagree with the first peer's says so in `wrong` and carries no time. The first of our rows
    is the backend that runs; `backend` puts another in place of all of them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for case in cases or (_CPU_CASES if device.type == "cpu" else _CUDA_CASES):
        logger.info("%d tokens, %s, %s", case.tokens, case.dtype, case.pattern)
        work = _work(case, device)
        ask = Ask.of(work.q_THD, work.v_TGD)
        found = (
            [backend] if backend is not None else [b for b in installed_backends(ask) if _is_contestant(b, case, ask)]
        )
        rows += _rows(case, work, found)
    return rows


def _work(case: Case, device: torch.device) -> Work:
    heads, groups, dim = (4, 2, 64) if device.type == "cpu" else (32, 8, 128)
    # On a GPU half a billion numbers are drawn at once, a processor takes seconds for them.
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((case.tokens, heads, dim), (case.tokens, groups, dim), (case.tokens, groups, dim))
    q, k, v, dout = (
        torch.randn(size, generator=generator, device=device).to(case.dtype)
        for size in (*sizes, (case.tokens, heads, dim))
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


def _rows(case: Case, work: Work, backends: list[Backend]) -> list[dict[str, Any]]:
    peers = [make(work) for make in peers_on(work.q_THD.device, case.dtype) if _fits(case, make)]
    if not peers:
        return []
    peers, failed, want = _able(peers)
    if want is None:
        return [{**_shape(case, work), "contestant": name, "failed": why} for name, why in failed]
    contestants = [*(ours(backend, work) for backend in backends), *peers]
    errors = [_error(contestant, want) for contestant in contestants]
    peaks = {direction: [_peak(c, direction) for c in contestants] for direction in ("forward", "backward")}
    times = _times(contestants)
    rows: list[dict[str, Any]] = [{**_shape(case, work), "contestant": name, "failed": why} for name, why in failed]
    for direction in ("forward", "backward"):
        seconds = [statistics.median(rounds) for rounds in times[direction]]
        fastest = min(range(len(backends), len(contestants)), key=seconds.__getitem__)
        for index, contestant in enumerate(contestants):
            row = {**_shape(case, work), "direction": direction, "contestant": contestant.name, "error": errors[index]}
            # Not below: a NaN is no success.
            if not errors[index] < _TOLERANCE[case.dtype]:
                rows.append({**row, "wrong": f"differs by {errors[index]:.2g}; allowed {_TOLERANCE[case.dtype]:.2g}"})
                continue
            rounds = zip(times[direction][index], times[direction][fastest], strict=True)
            ratio = statistics.median(mine / other for mine, other in rounds)
            speed = {"seconds": seconds[index], "ratio": ratio, "fastest_peer": contestants[fastest].name}
            rows.append({**row, **speed, "peak_bytes": peaks[direction][index]})
    return rows


def _able(
    peers: list[Contestant],
) -> tuple[list[Contestant], list[tuple[str, str]], tuple[Tensor, ...] | None]:
    """The peers that compute this case here, (name, why) of those that do not, and what the first of them gives.

    This run also compiles them.
    """
    able: list[Contestant] = []
    failed: list[tuple[str, str]] = []
    want = None
    for peer in peers:
        try:
            found = peer.backward(peer.forward())
        except RuntimeError as problem:
            failed.append((peer.name, " ".join(str(problem).split())[:120]))
        else:
            able.append(peer)
            want = found if want is None else want
    return able, failed, want


def _shape(case: Case, work: Work) -> dict[str, Any]:
    return {
        "pattern": case.pattern,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "heads": f"{work.q_THD.shape[1]}:{work.k_TGD.shape[1]}",
    }


def _error(contestant: Contestant, want: tuple[Tensor, ...]) -> float:
    """Worst relative difference of out, dq, dk and dv; this first run also compiles what is compiled."""
    return max(relative_error(a, b) for a, b in zip(contestant.backward(contestant.forward()), want, strict=True))


def _peak(contestant: Contestant, direction: str) -> int | None:
    made = contestant.forward()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if direction == "backward":
        return peak_bytes_of(lambda: contestant.backward(made), device)
    return peak_bytes_of(contestant.forward, device)


def _is_contestant(backend: Backend, case: Case, ask: Ask) -> bool:
    # Tiles of plain torch are a last resort: slower at any length, on a GPU by minutes.
    return backend.name != "tiled" or case.tokens <= (_LONGEST_TILED if ask.device == "cpu" else 0)


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
