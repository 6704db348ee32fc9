"""Workers that take the time a formula says: for questions about routes and roles that no clock should answer.

A worker computes iterations: a token for each sequence that decodes, then prompts in the order they came, as far as
its quota lets it. Discrete events, no threads, no randomness but that of the workload.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from farspan.serve.quotas import NO_QUOTA, Quota, in_force

STEP_S, PROMPT_TOKEN_S, ROW_S = 4e-3, 1e-4, 3e-4
TRANSFER_S = 5e-3
MAX_BATCH, MAX_SEQUENCES = 512, 32


@dataclass(slots=True)
class Job:
    """A request, and what became of it."""

    at_s: float
    prompt: int
    answer: int
    first_s: float = -1.0
    end_s: float = -1.0
    left: int = 0
    """Of the prompt, then of the answer."""
    decodes_on: int = -1

    def meets(self, first_token_s: float, token_s: float) -> bool:
        if self.end_s < 0:
            return False
        gaps = max(1, self.answer - 1)
        return self.first_s - self.at_s <= first_token_s and (self.end_s - self.first_s) / gaps <= token_s


@dataclass(slots=True)
class Machine:
    """One worker."""

    number: int
    quota: Quota = NO_QUOTA
    prompts: list[Job] = field(default_factory=list)
    decoding: list[Job] = field(default_factory=list)
    busy: bool = False

    @property
    def queue_tokens(self) -> int:
        return sum(job.left for job in self.prompts)

    @property
    def kv_tokens(self) -> int:
        return sum(job.prompt + job.answer - job.left for job in self.decoding)


Route = Callable[["Cluster", Job], tuple[int, int]]
"""(who computes the prompt, who decodes) of a job that arrives now."""


class Cluster:
    """Machines that work off jobs. `tick` is called every second of simulated time."""

    def __init__(self, num_machines: int, route: Route, tick: Callable[[Cluster], None] | None = None) -> None:
        self.machines = [Machine(number) for number in range(num_machines)]
        self.now_s = 0.0
        self.finished: Callable[[Job], None] = lambda job: None
        self._route, self._tick = route, tick
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def run(self, jobs: list[Job], until_s: float) -> None:
        for job in jobs:
            self._at(job.at_s, lambda job=job: self._arrive(job))  # type: ignore[misc]
        if self._tick is not None:
            self._at(1.0, self._ticked)
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()

    def _ticked(self) -> None:
        assert self._tick is not None
        self._tick(self)
        self._at(self.now_s + 1.0, self._ticked)

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_s, self._num_events, act))

    def _arrive(self, job: Job) -> None:
        first, job.decodes_on = self._route(self, job)
        job.left = job.prompt
        self.machines[first].prompts.append(job)
        self._wake(self.machines[first])

    def _wake(self, machine: Machine) -> None:
        if not machine.busy and (machine.prompts or machine.decoding):
            machine.busy = True
            self._iterate(machine)

    def _iterate(self, machine: Machine) -> None:
        quota = in_force(machine.quota, len(machine.prompts), len(machine.decoding), Quota(MAX_BATCH, MAX_SEQUENCES))
        rows = machine.decoding[: quota.decode_tokens or MAX_SEQUENCES][:MAX_SEQUENCES]
        budget = min(MAX_BATCH - len(rows), MAX_BATCH if quota.prefill_tokens is None else quota.prefill_tokens)
        chunks: list[tuple[Job, int]] = []
        for job in machine.prompts:
            count = min(job.left, budget)
            budget -= count
            if count:
                chunks.append((job, count))
        took_s = STEP_S + PROMPT_TOKEN_S * sum(count for _, count in chunks) + ROW_S * len(rows)
        self._at(self.now_s + took_s, lambda: self._done(machine, rows, chunks))

    def _done(self, machine: Machine, rows: list[Job], chunks: list[tuple[Job, int]]) -> None:
        for job in rows:
            job.left -= 1
            machine.decoding.remove(job)
            if job.left:
                # Behind the others: they take turns where not all may.
                machine.decoding.append(job)
            else:
                self._end(job)
        for job, count in chunks:
            job.left -= count
            if job.left == 0:
                machine.prompts.remove(job)
                self._first(machine, job)
        machine.busy = False
        self._wake(machine)

    def _first(self, machine: Machine, job: Job) -> None:
        job.first_s, job.left = self.now_s, job.answer - 1
        if job.left == 0:
            self._end(job)
        elif job.decodes_on == machine.number:
            machine.decoding.append(job)
        else:
            self._at(self.now_s + TRANSFER_S, lambda: self._landed(job))

    def _landed(self, job: Job) -> None:
        machine = self.machines[job.decodes_on]
        machine.decoding.append(job)
        self._wake(machine)

    def _end(self, job: Job) -> None:
        job.end_s = self.now_s
        self.finished(job)
