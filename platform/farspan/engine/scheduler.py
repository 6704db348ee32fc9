"""Which sequences compute how many tokens in the next iteration: a pure function of plain values.

Decode first, then prompts in chunks, then whoever waits, as long as tokens, pages and quotas last. A sequence is
admitted when the pages of everything it holds so far are free, beyond those that running prompts still need and one
more for each sequence that is already growing: how many run side by side follows from memory. When a growing sequence
finds no page, the last in rank gives its pages back; they wait in host memory or are computed again later, whichever
is cheaper. Ranks are a total order, so the first always gets on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farspan.engine.fairness import too_many


@dataclass(frozen=True, slots=True)
class Limits:
    """Most of everything in one iteration. The quotas are a worker's role: prompts only, decode only, or a mix."""

    max_batch_tokens: int
    max_sequences: int
    page_tokens: int
    prefill_tokens: int | None = None
    """Tokens of prompts; None: as many as there is room for."""
    decode_tokens: int | None = None
    """Sequences that decode a token; None: as many as there is room for."""
    num_groups: int = 1
    """Pages for every `page_tokens` tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the scheduler sees of a sequence."""

    request_id: str
    num_tokens: int
    num_computed: int
    num_pages: int
    """Length of its table, gone pages included."""
    num_own: int | None = None
    """Of its pages, those nobody else holds: they are free when it is preempted. None: all."""
    priority: int = 0
    tenant: str = ""
    waited: int = 0
    """Iterations since it was last computed."""
    hit_tokens: int = 0
    """Tokens a waiting sequence finds computed, in pages it does not hold yet."""
    hit_pages: int = 0
    """The whole ones of those pages, which it will share."""
    hit_idle: int = 0
    """Those of them that nobody holds: taking them costs free pages."""
    next_page: bytes | None = None
    """Name of the first whole page of it that is not computed."""
    num_state: int = 0
    """Pages' worth of its recurrent state, which moves with its pages."""
    num_gone: int = 0
    """Pages of the table that it gave back, because nobody reads them any more."""
    hit_gone: int = 0
    """Of the hit ones, those that are not there, because nobody will read them."""
    most_pages: int | None = None
    """Most pages it holds at a time until its prompt is computed. None: all of them."""
    leaves: bool = False
    """Its state is put into pages once its last token is computed: it goes on elsewhere."""

    @property
    def pending(self) -> int:
        return self.num_tokens - max(self.num_computed, self.hit_tokens)

    @property
    def has_promise(self) -> bool:
        """Whether pages stay free for what it will still need to finish its prompt."""
        return self.pending > 1 or self.leaves

    @property
    def num_moved(self) -> int:
        """Pages' worth of what waits in host memory when it is preempted."""
        return self.num_pages - self.num_gone + self.num_state

    @property
    def num_freed(self) -> int:
        return self.num_pages - self.num_gone if self.num_own is None else self.num_own


@dataclass(frozen=True, slots=True)
class Costs:
    """What it costs to get a preempted sequence back."""

    token_s: float
    """Computing a token again."""
    page_s: float
    """Moving a page out and back in."""
    room_pages: int
    """Pages that host memory still takes."""

    def offload(self, row: Row, taken: int) -> bool:
        """Whether pages should wait in host memory, of which `taken` pages are promised already."""
        moved = row.num_moved
        fits = row.num_pages > 0 and moved <= self.room_pages - taken
        return fits and moved * self.page_s < row.num_computed * self.token_s


ALWAYS_RECOMPUTE = Costs(0.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `num_tokens` more tokens of a sequence, which holds `num_pages` pages from then on."""

    request_id: str
    num_tokens: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Preemption:
    """Give all pages of a sequence back first; `offload`: keep their content in host memory."""

    request_id: str
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    preempted: tuple[Preemption, ...]
    chunks: tuple[Chunk, ...]
    """Decode rows first; a sequence appears at most once. Those not running before are admitted."""


def schedule(
    running: Sequence[Row],
    waiting: Iterable[Row],
    free_pages: int,
    limits: Limits,
    *,
    parked: Sequence[Row] = (),
    costs: Costs = ALWAYS_RECOMPUTE,
) -> Decision:
    """The next iteration.

    `running` is ordered by rank, `waiting` as it should be admitted: it is read only as far as there is room.
    `parked` are those of `waiting` that hold pages which arrived from elsewhere.
    """
    plan = _Plan(list(running), list(parked), free_pages, limits, costs)
    ahead = iter(waiting)
    head = next(ahead, None)
    if head is not None:
        plan.make_room(head)
        ahead = itertools.chain([head], ahead)
    decoding = [row for row in running if row.pending == 1]
    for row in sorted(decoding, key=lambda row: (-row.priority, -row.waited)):
        plan.grow(row)
    for row in running:
        if row.pending > 1:
            plan.grow(row)
    # Somebody just lost their pages: whoever came now would take them away again.
    while not plan.preempted and plan.has_room and (next_row := next(ahead, None)) is not None:
        if not plan.admit(next_row):
            break
    return Decision(tuple(plan.preempted), tuple(plan.chunks))


class _Plan:
    def __init__(self, running: list[Row], parked: list[Row], free_pages: int, limits: Limits, costs: Costs) -> None:
        # Parked: waiting with pages that arrived from elsewhere. They go before a running sequence must.
        self.active, self.parked, self.free, self.limits, self.costs = running, parked, free_pages, limits, costs
        self.budget = limits.max_batch_tokens
        self.prefill = limits.max_batch_tokens if limits.prefill_tokens is None else limits.prefill_tokens
        self.decode = limits.max_batch_tokens if limits.decode_tokens is None else limits.decode_tokens
        self.preempted: list[Preemption] = []
        self.lost: set[str] = set()
        self.chunks: list[Chunk] = []
        self.taken: set[str] = set()
        self.offloaded_pages = 0
        # Pages that prompts of active sequences will still need.
        self.promised = sum(self._lacking(row) for row in running if row.has_promise)
        self.coming = {row.next_page for row in running if row.pending > 1}

    @property
    def has_room(self) -> bool:
        # Parked sequences only decode: they need no quota for prompts.
        quota = self.prefill > 0 or bool(self.parked)
        return quota and self.budget > 0 and len(self.active) < self.limits.max_sequences

    def make_room(self, head: Row) -> None:
        """Preempt sequences of lower priority, or of a tenant that has too many, if that lets the first one in."""
        lower = [row for row in self.active if row.priority < head.priority] or self._beyond_fair(head)
        missing = self._missing(head)
        if not lower or self._is_coming(head) or (missing <= 0 and len(self.active) < self.limits.max_sequences):
            return
        if missing > sum(row.num_freed for row in lower):
            return
        while lower and (self._missing(head) > 0 or len(self.active) >= self.limits.max_sequences):
            self._preempt(self.active, lower.pop())

    def _beyond_fair(self, head: Row) -> list[Row]:
        """Those that may give way to a tenant of which nothing runs: of the tenant with most, all but the first."""
        crowd = too_many(head.tenant, [row.tenant for row in self.active])
        return [row for row in self.active if row.tenant == crowd and row.priority <= head.priority][1:]

    def grow(self, row: Row) -> None:
        """Compute the next tokens of a running sequence, at the cost of later ranks if need be."""
        count = self._affordable(row)
        if row.request_id in self.lost or count < 1:
            return
        wanted = max(row.num_pages, self._pages_at(row, row.num_computed + count))
        while wanted - row.num_pages > self.free:
            victim = self._last_in_rank()
            if victim == row and (self.preempted or self.chunks):
                # The others go on, or their pages are counted only in the next iteration because two shared them.
                return
            self._preempt(self.parked or self.active, victim)
            if victim == row:
                return
        if row.has_promise:
            self.promised -= wanted - row.num_pages
        self._take(row, count, wanted, wanted - row.num_pages)

    def admit(self, row: Row) -> bool:
        """Let a waiting sequence in, if everything it needs to finish its prompt is there; false: nobody after it.

        One that must wait for a page that is being computed, or has no quota, keeps nobody from coming in.
        """
        if self._is_coming(row) or (self.budget > 0 and self._affordable(row) < 1):
            return True
        if row in self.parked:
            self.parked.remove(row)
        # With nothing running, pages that only wait must not keep the oldest from starting.
        while not self.active and self.parked and self._missing(row) > 0:
            self._preempt(self.parked, self.parked[-1])
        count = self._affordable(row)
        if self.preempted or count < 1 or self._missing(row) > 0:
            return False
        start = max(row.num_computed, row.hit_tokens)
        wanted = max(row.num_pages, self._pages_at(row, start + count))
        self.active.append(row)
        self.coming.add(row.next_page)
        new = wanted - row.num_pages - row.hit_pages
        self.promised += self._lacking(row) - new
        self._take(row, count, wanted, new + row.hit_idle)
        return True

    def _is_coming(self, row: Row) -> bool:
        """Whether somebody computes the next page of a row right now: later, it is found."""
        return row.next_page is not None and row.next_page in self.coming

    def _missing(self, row: Row) -> int:
        """Pages that must become free before a waiting sequence can be admitted."""
        growing = len(self.active) * self.limits.num_groups
        return self._lacking(row) + row.hit_idle + self.promised + growing - self.free

    def _lacking(self, row: Row) -> int:
        """Pages that a row still has to get to finish its prompt, beside those it finds."""
        table = max(row.num_pages, self._pages_at(row, row.num_tokens)) - row.num_pages - row.hit_pages
        if row.most_pages is None:
            return table
        held = row.num_pages - row.num_gone + row.hit_pages - row.hit_gone
        return max(0, min(table, row.most_pages - held))

    def _affordable(self, row: Row) -> int:
        quota = self.decode if row.pending == 1 else self.prefill
        return min(row.pending, self.budget, quota)

    def _take(self, row: Row, count: int, pages: int, cost: int) -> None:
        self.budget -= count
        if row.pending == 1:
            self.decode -= count
        else:
            self.prefill -= count
        self.free -= cost
        self.taken.add(row.request_id)
        self.chunks.append(Chunk(row.request_id, count, pages))

    def _last_in_rank(self) -> Row:
        return next(row for row in reversed(self.parked or self.active) if row.request_id not in self.taken)

    def _preempt(self, group: list[Row], victim: Row) -> None:
        group.remove(victim)
        offload = self.costs.offload(victim, self.offloaded_pages)
        self.offloaded_pages += victim.num_moved if offload else 0
        self.preempted.append(Preemption(victim.request_id, offload))
        self.lost.add(victim.request_id)
        self.free += victim.num_freed
        if victim.has_promise and group is self.active:
            self.promised -= self._lacking(victim)

    def _pages_at(self, row: Row, num_tokens: int) -> int:
        """Length of a row's table once so many of its tokens are computed."""
        pages = -(-num_tokens // self.limits.page_tokens) * self.limits.num_groups
        return pages + row.num_state if row.leaves and num_tokens >= row.num_tokens else pages
