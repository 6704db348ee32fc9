"""The few numbers a reader wants first, computed from events. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.telemetry.kinds import (
    CheckpointPublished,
    Event,
    EventBody,
    Note,
    RequestServed,
    RunFinished,
    RunStarted,
    StepReport,
)


@dataclass(frozen=True, slots=True)
class Summary:
    """Events by kind, in the order they happened.

    A log may hold several attempts at one run. `started` is the newest, `finished` belongs to it; of a step that was
    done again after a resume only the newest report counts, because the weights of the older one are gone.
    """

    started: RunStarted | None
    finished: RunFinished | None
    steps: tuple[StepReport, ...]
    requests: tuple[RequestServed, ...]
    checkpoints: tuple[CheckpointPublished, ...]
    notes: tuple[Note, ...]

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole training, not the mean of the steps: long steps count by their length."""
        seconds = math.fsum(step.step_s for step in self.steps)
        return self.tokens / seconds if seconds > 0 else math.nan

    @property
    def peak_memory_bytes(self) -> int:
        return max((step.peak_memory_bytes for step in self.steps), default=0)

    @property
    def inter_token_s(self) -> tuple[float, ...]:
        return tuple(gap for request in self.requests for gap in request.inter_token_s)

    @property
    def bad_steps(self) -> tuple[int, ...]:
        """Steps whose loss or gradient norm is not a number."""
        return tuple(s.step for s in self.steps if not (math.isfinite(s.loss) and math.isfinite(s.grad_norm)))


def summarize(events: Sequence[Event]) -> Summary:
    bodies: list[EventBody] = [event.body for event in events]
    newest = max((i for i, body in enumerate(bodies) if isinstance(body, RunStarted)), default=0)
    steps = {body.step: body for body in bodies if isinstance(body, StepReport)}
    return Summary(
        started=next((b for b in bodies[newest:] if isinstance(b, RunStarted)), None),
        finished=next((b for b in bodies[newest:] if isinstance(b, RunFinished)), None),
        steps=tuple(steps[number] for number in sorted(steps)),
        requests=tuple(b for b in bodies if isinstance(b, RequestServed)),
        checkpoints=tuple(b for b in bodies if isinstance(b, CheckpointPublished)),
        notes=tuple(b for b in bodies if isinstance(b, Note)),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank); NaN of nothing.

    Nearest rank, not interpolation: every percentile in a report is a time that somebody really waited.
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]
