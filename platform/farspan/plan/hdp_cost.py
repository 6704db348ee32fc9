"""Which micro-batches to time so that documents can be balanced by seconds, and what their times say. Pure.

The seconds of a micro-batch on one rank are taken to be quadratic * s^2 + linear * s + each, summed over its documents,
and `fixed` once. What ranks that share a document wait for each other's messages is what such a micro-batch takes
beyond that. No coefficient is negative: a step has nothing that saves time by being there.

Letters: N timed micro-batches, F coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from farspan.data.balance import Cost

_HALVINGS = 4
_PIECES = (4, 16, 64)
_SHORTEST_PIECE = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """A micro-batch to be timed: documents of these lengths on one rank, or one document on `num_ranks`."""

    lengths: tuple[int, ...]
    num_ranks: int = 1


@dataclass(frozen=True, slots=True)
class FittedCost:
    """A cost in seconds."""

    cost: Cost
    error: float
    """What it says of a timed micro-batch is off by at most this share of its time."""


def trials_of(capacity: int, longest: int, num_ranks: int) -> tuple[Trial, ...]:
    """What to time where a rank holds `capacity` tokens and a document has at most `longest`: nothing larger than what
    a step may hold.
    """
    most = min(capacity, longest)
    alone = [(most >> halving,) for halving in range(_HALVINGS + 1) if most >> halving > 0]
    packed = [(most // pieces,) * pieces for pieces in _PIECES if most // pieces >= _SHORTEST_PIECE]
    found = [Trial(lengths) for lengths in (*alone, *packed)]
    if longest > capacity and num_ranks > 1:
        for ranks in sorted({2, min(num_ranks, -(-longest // capacity)), num_ranks}):
            whole = min(longest, ranks * capacity)
            found += [Trial((tokens,), ranks) for tokens in (whole, -(-whole // 4))]
    return tuple(dict.fromkeys(found))


def fit_cost(trials: Sequence[Trial], seconds: Sequence[float]) -> FittedCost:
    """The cost whose largest miss is small in proportion: least squares of (told - timed) / timed."""
    alone = [(one, took) for one, took in zip(trials, seconds, strict=True) if one.num_ranks == 1]
    rows = [_alone_row(one.lengths) for one, _ in alone]
    # Whatever else explains the times, every token is computed.
    quadratic, linear, each, fixed = _fit(rows, [took for _, took in alone], needed=1)
    cost = Cost(quadratic, linear, fixed, each)
    beyond = [
        (one, took, took - cost.shared(one.lengths[0], one.num_ranks))
        for one, took in zip(trials, seconds, strict=True)
        if one.num_ranks > 1
    ]
    if beyond:
        shared_rows = [_shared_row(one) for one, _, _ in beyond]
        message, travel = _fit(shared_rows, [more for *_, more in beyond], [took for _, took, _ in beyond])
        cost = Cost(quadratic, linear, fixed, each, message, travel)
    misses = [abs(_told(cost, one) - took) / took for one, took in zip(trials, seconds, strict=True)]
    return FittedCost(cost, max(misses))


def _told(cost: Cost, one: Trial) -> float:
    if one.num_ranks > 1:
        return cost.shared(one.lengths[0], one.num_ranks)
    return sum(map(cost.document, one.lengths)) + cost.fixed


def _alone_row(lengths: Sequence[int]) -> tuple[float, ...]:
    return (float(sum(s * s for s in lengths)), float(sum(lengths)), float(len(lengths)), 1.0)


def _shared_row(one: Trial) -> tuple[float, ...]:
    further = one.num_ranks - 1
    return (float(further), further * one.lengths[0] / one.num_ranks)


def _fit(
    rows: Sequence[tuple[float, ...]],
    values: Sequence[float],
    scale: Sequence[float] | None = None,
    needed: int | None = None,
) -> list[float]:
    """Coefficients of least squares of (rows @ coefficients - values) / scale, none of them negative.

    With so few of them every subset that may be positive is tried. `needed` is the one that must be.
    """
    size_N1 = np.asarray(values if scale is None else scale, dtype=np.float64)[:, None]
    rows_NF, values_N = np.asarray(rows, dtype=np.float64) / size_N1, np.asarray(values, dtype=np.float64)
    values_N = values_N / size_N1[:, 0]
    largest_F, num = rows_NF.max(axis=0), rows_NF.shape[1]
    best, least = [0.0] * num, math.inf if needed is not None else float((values_N**2).sum())
    for chosen in (list(some) for size in range(1, num + 1) for some in combinations(range(num), size)):
        if needed is not None and needed not in chosen:
            continue
        found = np.linalg.lstsq(rows_NF[:, chosen] / largest_F[chosen], values_N, rcond=None)[0]
        missed = float(((rows_NF[:, chosen] / largest_F[chosen] @ found - values_N) ** 2).sum())
        if (found > 0).all() and missed < least:
            least, best = missed, [0.0] * num
            for column, value in zip(chosen, found / largest_F[chosen], strict=True):
                best[column] = float(value)
    return best
