"""Which sequences compute how many tokens in the next iteration: a pure function of plain values.

Decode first, then prompts in chunks, oldest first. A sequence is admitted when the pages of everything it holds so
far are free, and one more for each sequence that is already growing. When a growing sequence finds no page, the
youngest sequence gives its pages back and is computed again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    max_batch_tokens: int
    max_sequences: int
    page_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """What the scheduler sees of a sequence."""

    request_id: str
    num_tokens: int
    num_computed: int
    num_pages: int

    @property
    def pending(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `num_tokens` more tokens of a sequence, which holds `num_pages` pages from then on."""

    request_id: str
    num_tokens: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Decision:
    preempted: tuple[str, ...]
    """Give back all pages first."""
    chunks: tuple[Chunk, ...]
    """Decode rows first; a sequence appears at most once. Those not running before are admitted."""


def schedule(running: Sequence[Row], waiting: Sequence[Row], free_pages: int, limits: Limits) -> Decision:
    """The next iteration. `running` and `waiting` are ordered oldest first."""
    plan = _Plan(list(running), [row for row in waiting if row.num_pages], free_pages, limits)
    for row in running:
        if row.pending == 1:
            plan.grow(row)
    for row in running:
        if row.pending > 1:
            plan.grow(row)
    # Somebody just lost their pages: whoever came now would take them away again.
    for row in () if plan.preempted else waiting:
        if row.request_id in plan.preempted or not plan.admit(row):
            break
    return Decision(tuple(plan.preempted), tuple(plan.chunks))


class _Plan:
    def __init__(self, running: list[Row], parked: list[Row], free_pages: int, limits: Limits) -> None:
        # Parked: waiting with pages that arrived from elsewhere. They go before a running sequence must.
        self.active, self.parked, self.free, self.limits = running, parked, free_pages, limits
        self.budget = limits.max_batch_tokens
        self.preempted: list[str] = []
        self.chunks: list[Chunk] = []

    def grow(self, row: Row) -> None:
        """Compute the next tokens of a running sequence, at the cost of younger ones if need be."""
        if row not in self.active or self.budget < 1:
            return
        count = min(row.pending, self.budget)
        wanted = max(row.num_pages, self._pages(row.num_computed + count))
        while wanted - row.num_pages > self.free:
            if self._preempt_youngest() == row:
                return
        self._take(row, count, wanted)

    def admit(self, row: Row) -> bool:
        """Let a waiting sequence in, if everything it needs to finish its prompt is there."""
        wanted = self._pages(row.num_tokens)
        growth = len(self.active)
        if row in self.parked:
            self.parked.remove(row)
        # With nothing running, pages that only wait must not keep the oldest from starting.
        while not self.active and self.parked and wanted - row.num_pages > self.free:
            self._preempt_youngest()
        if self.budget < 1 or growth >= self.limits.max_sequences or wanted - row.num_pages + growth > self.free:
            return False
        self.active.append(row)
        self._take(row, min(row.pending, self.budget), wanted)
        return True

    def _take(self, row: Row, count: int, pages: int) -> None:
        self.budget -= count
        self.free -= pages - row.num_pages
        self.chunks.append(Chunk(row.request_id, count, pages))

    def _preempt_youngest(self) -> Row:
        taken = {chunk.request_id for chunk in self.chunks}
        group = self.parked or self.active
        victim = next(row for row in reversed(group) if row.request_id not in taken)
        group.remove(victim)
        self.preempted.append(victim.request_id)
        self.free += victim.num_pages
        return victim

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_tokens)
