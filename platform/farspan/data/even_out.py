"""Items handed to ranks so that all of them end at about the same time. Pure."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

_ENOUGH = 1.002
"""The costliest rank over the mean at which looking for better ends."""
_MOST_EXCHANGES = 2000


def even_out(weights: Mapping[int, float], loads: Sequence[float]) -> list[list[int]]:
    """The items of each rank, ranks having `loads` already: the heaviest item goes to the least loaded rank, and then
    the most loaded ranks give away or exchange items as long as that helps.
    """
    total = list(loads)
    held: list[list[tuple[float, int]]] = [[] for _ in loads]
    queue = [(load, rank) for rank, load in enumerate(total)]
    heapq.heapify(queue)
    for item in sorted(weights, key=lambda i: (-weights[i], i)):
        load, rank = heapq.heappop(queue)
        insort(held[rank], (weights[item], item))
        total[rank] = load + weights[item]
        heapq.heappush(queue, (total[rank], rank))
    for _ in range(_MOST_EXCHANGES):
        high = max(range(len(total)), key=lambda r: (total[r], -r))
        if total[high] * len(total) <= _ENOUGH * sum(total) or not _relieve(high, held, total):
            break
    return [sorted(item for _, item in own) for own in held]


def _relieve(high: int, held: list[list[tuple[float, int]]], total: list[float]) -> bool:
    """Give an item of `high` to another rank, or exchange two; False: no rank makes the worst of both better."""
    for low in sorted(range(len(total)), key=lambda r: (total[r], r)):
        gap = total[high] - total[low]
        if gap <= 0:
            return False
        found = _best(held[high], held[low], gap)
        if found is not None:
            given, taken = found
            moved = given[0] - (taken[0] if taken else 0.0)
            held[high].remove(given)
            insort(held[low], given)
            if taken:
                held[low].remove(taken)
                insort(held[high], taken)
            total[high] -= moved
            total[low] += moved
            return True
    return False


def _best(
    high: Sequence[tuple[float, int]], low: Sequence[tuple[float, int]], gap: float
) -> tuple[tuple[float, int], tuple[float, int] | None] | None:
    """What to give and what to take back, so that what moves comes nearest to half of the gap."""
    best, left = None, gap * (1 - 1e-9)
    for given in high:
        # Nothing, or the item of the other rank with which the difference is nearest to half of the gap.
        at = bisect_left(low, (given[0] - gap / 2, -1))
        for taken in (None, *low[max(0, at - 1) : at + 1]):
            moved = given[0] - (taken[0] if taken else 0.0)
            after = max(moved, gap - moved)
            if moved > 0 and after < left:
                best, left = (given, taken), after
    return best
