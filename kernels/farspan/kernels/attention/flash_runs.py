"""Packed documents computed run by run: each run, some documents in a row, by the kernel that suits it.

Letters: contract.py; a `FlashKernel` and its spans: flash.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from farspan.kernels.attention.flash import FlashKernel, Sight, Spans


@dataclass(frozen=True, slots=True)
class Run:
    """Documents first..stop, which one call of one kernel computes."""

    kernel: FlashKernel
    first: int
    stop: int
    queries: slice
    keys: slice


def runs_of(are_long: Sequence[bool]) -> list[tuple[int, int, bool]]:
    """(first document, end, whether it is one long document), in order and without gaps."""
    runs: list[tuple[int, int, bool]] = []
    for document, is_long in enumerate(are_long):
        if runs and not is_long and not runs[-1][2]:
            runs[-1] = (runs[-1][0], document + 1, False)
        else:
            runs.append((document, document + 1, is_long))
    return runs


def lengths_of(spans: Spans) -> Iterator[tuple[int, int]]:
    """(queries, keys) of each document."""
    for (a, b), (c, d) in zip(pairwise(spans.query_bounds), pairwise(spans.key_bounds), strict=True):
        yield b - a, d - c


def split(spans: Spans, are_long: Sequence[bool], long: FlashKernel, rest: FlashKernel) -> list[Run]:
    """Each long document is a run of `long`; what lies between two of them is one of `rest`."""
    return [
        Run(
            kernel=long if is_long else rest,
            first=first,
            stop=stop,
            queries=slice(spans.query_bounds[first], spans.query_bounds[stop]),
            keys=slice(spans.key_bounds[first], spans.key_bounds[stop]),
        )
        for first, stop, is_long in runs_of(are_long)
    ]


def forward_by_runs(
    runs: Sequence[Run], q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, spans: Spans, sight: Sight
) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_HT)."""
    if len(runs) == 1:
        return runs[0].kernel.forward(q_THD, k_SGD, v_SGD, spans, sight)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_HT = q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=torch.float32)
    for run in runs:
        here, there = run.queries, run.keys
        part_THD, part_HT = run.kernel.forward(
            q_THD[here], k_SGD[there], v_SGD[there], spans.part(run.first, run.stop), sight
        )
        out_THD[here], lse_HT[:, here] = part_THD, part_HT
    return out_THD, lse_HT


def backward_by_runs(
    runs: Sequence[Run],
    dout_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    spans: Spans,
    sight: Sight,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if len(runs) == 1:
        return runs[0].kernel.backward(dout_THD, q_THD, k_SGD, v_SGD, out_THD, lse_HT, spans, sight)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_SGD, v_SGD))
    for run in runs:
        here, there = run.queries, run.keys
        dq[here], dk[there], dv[there] = run.kernel.backward(
            *(dout_THD[here], q_THD[here], k_SGD[there], v_SGD[there], out_THD[here]),
            lse_HT[:, here].contiguous(),
            spans.part(run.first, run.stop),
            sight,
        )
    return dq, dk, dv
