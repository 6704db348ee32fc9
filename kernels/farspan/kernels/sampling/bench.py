"""Choosing tokens by the kernel of this machine beside plain torch: same logits, same run, same tokens, or no time.

    farspan bench sampling

torch is the reference, which gives the same tokens; where nothing is cut, also `softmax` and `multinomial` in fp32,
whose tokens nobody can ask for again. Contestants take turns; a ratio is the median of the rounds' ratios to the
reference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.sampling.contract import SURE, Draws
from farspan.kernels.sampling.dispatch import choose_sampling
from farspan.kernels.sampling.reference import sample_reference

_ROUNDS = 7
REFERENCE, OURS, MULTINOMIAL = "torch", "farspan", "torch multinomial"


@dataclass(frozen=True, slots=True)
class Case:
    rows: int
    vocab_size: int
    dtype: torch.dtype
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def asks(self) -> str:
        cuts = {"top-k": self.top_k, "top-p": self.top_p % 1, "min-p": self.min_p}
        named = " ".join(f"{name} {value:g}" for name, value in cuts.items() if value)
        return named or ("drawn" if self.temperature else "greedy")

    def draws(self, device: torch.device) -> Draws:
        floats = torch.tensor([self.temperature, self.top_p, self.min_p], dtype=torch.float64, device=device)
        temperature_N, top_p_N, min_p_N = floats[:, None].repeat(1, self.rows)
        top_k_N = torch.full((self.rows,), self.top_k, device=device)
        return Draws(temperature_N, top_k_N, top_p_N, min_p_N.log())


_ASKED: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"min_p": 0.05}, {"top_k": 50}, {"top_p": 0.9})
_CASES = tuple(
    Case(rows, vocab_size, dtype, **asked)
    for vocab_size in (32_000, 128_256)
    for rows in (1, 64)
    for dtype in (torch.float32, torch.bfloat16)
    for asked in _ASKED
)


def bench_sampling(cases: Sequence[Case] = _CASES) -> list[dict[str, Any]]:
    """One row per case and contestant: seconds, and the ratio to the reference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [row for case in cases for row in _rows(case, device)]


def _rows(case: Case, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(case.rows, case.vocab_size, generator=generator)).to(device, case.dtype)
    points_N = torch.rand(case.rows, generator=generator, dtype=torch.float64).to(device)
    draws = case.draws(device)
    runs: dict[str, Callable[[], Tensor]] = {REFERENCE: lambda: sample_reference(logits_NV, draws, points_N).tokens_N}
    sampling = choose_sampling(device.type, case.dtype, case.vocab_size)
    if sampling is not None and (sampling.cuts or (not case.top_k and case.top_p == 1)):
        runs[OURS] = lambda: sampling.sample(logits_NV, draws, points_N).tokens_N
    if case.asks == "drawn":
        runs[MULTINOMIAL] = lambda: (logits_NV.float() / case.temperature).softmax(-1).multinomial(1)
    want = sample_reference(logits_NV, draws, points_N)
    sure_N = want.margin_N >= SURE
    shape = {"rows": case.rows, "vocabulary": case.vocab_size, "dtype": str(case.dtype)[6:], "asks": case.asks}
    wrong = OURS in runs and bool((runs[OURS]() != want.tokens_N)[sure_N].any())
    if wrong:
        del runs[OURS]
    times = _times(runs)
    found = []
    for name, seconds in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(seconds, times[REFERENCE], strict=True))
        found.append({**shape, "contestant": name, "seconds": statistics.median(seconds), "ratio": ratio})
    return [*found, {**shape, "contestant": OURS, "wrong": "other tokens than the reference"}] if wrong else found


def _times(runs: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Seconds of every round per contestant, until its tokens are read; the order turned round in every second."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run().tolist()
    for number in range(_ROUNDS):
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            began = time.perf_counter()
            runs[name]().tolist()
            times[name].append(time.perf_counter() - began)
    return times
