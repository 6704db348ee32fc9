"""Tenants share the engine evenly: who was given least comes next, and nobody is kept out by one who has all of it.

Source: virtual token counters (Sheng et al. 2024, https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

# A decoded token costs about as much as two of a prompt: it reads all weights for itself alone.
DECODE_WEIGHT = 2.0
_MOST_TENANTS = 4096


class Service:
    """Weighted tokens each tenant was given, comparable between tenants."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    @property
    def given(self) -> Mapping[str, float]:
        return self._given

    def arrive(self, tenant: str, present: Collection[str]) -> None:
        """A tenant asks for something while `present` tenants are being served or wait.

        Time in which it asked for nothing gives no claim to more later on.
        """
        if tenant in present:
            return
        floor = min((self._given.get(other, 0.0) for other in present), default=max(self._given.values(), default=0.0))
        if len(self._given) >= _MOST_TENANTS:
            # Whoever is away starts at the floor in any case.
            self._given = {name: value for name, value in self._given.items() if name in present}
        self._given[tenant] = max(self._given.get(tenant, 0.0), floor)

    def charge(self, tenant: str, num_tokens: int, *, decode: bool) -> None:
        weight = DECODE_WEIGHT if decode else 1.0
        self._given[tenant] = self._given.get(tenant, 0.0) + weight * num_tokens


class Claim(NamedTuple):
    """What one that waits wants, and for whom."""

    request_id: str
    priority: int
    tenant: str
    num_tokens: int
    due_s: float = 0.0
    """Those of a tenant that are due earlier go first."""


def too_many(tenant: str, running: Iterable[str]) -> str | None:
    """Of the tenants of what runs, the one with most of it, at least two, where `tenant` has nothing; else none."""
    counts = Counter(running)
    most, count = counts.most_common(1)[0] if counts else ("", 0)
    return most if count > 1 and tenant not in counts else None


def crowds_out(running: Sequence[str], waiting: Collection[str]) -> bool:
    """Whether a tenant has several running while another waits for its first."""
    present = set(running)
    return len(present) < len(running) and not present.issuperset(waiting)


def fair_order(claims: Iterable[Claim], given: Mapping[str, float]) -> Iterator[str]:
    """The order of admission: by priority, then the tenant that was given least, then what of it is due first, then the
    order of `claims`.

    Being due brings a claim before others of its tenant only: no tenant gets ahead of another by being in a hurry.
    Every claim counts for its tenant as soon as it is named, so that a long line of one tenant is interleaved.
    """
    lines: dict[int, dict[str, list[Claim]]] = {}
    for claim in claims:
        lines.setdefault(claim.priority, {}).setdefault(claim.tenant, []).append(claim)
    for priority in sorted(lines, reverse=True):
        tenants = {name: deque(sorted(line, key=attrgetter("due_s"))) for name, line in lines[priority].items()}
        heap = [(given.get(tenant, 0.0), place, tenant) for place, tenant in enumerate(tenants)]
        heapq.heapify(heap)
        while heap:
            total, place, tenant = heapq.heappop(heap)
            claim = tenants[tenant].popleft()
            if tenants[tenant]:
                heapq.heappush(heap, (total + max(claim.num_tokens, 1), place, tenant))
            yield claim.request_id
