"""The few numbers a reader wants first, computed from events. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from farspan.telemetry.cost import cost
from farspan.telemetry.kinds import (
    Event,
    EventBody,
    PlanPredicted,
    PlanSteppedDown,
    RequestServed,
    RunFailed,
    RunFinished,
    RunPreempted,
    RunResized,
    RunRestarted,
    RunStarted,
    StepReport,
)
from farspan.telemetry.recorded import RecordedRun, recorded_run

Ending = RunFinished | RunFailed | RunPreempted
_ENDINGS = (RunFinished, RunFailed, RunPreempted)
_GOES_ON = (RunStarted, StepReport, PlanSteppedDown, RunResized, RunRestarted)


@dataclass(frozen=True, slots=True)
class Summary:
    """Events by kind, in the order they happened.

    A log may hold several starts of one run. `started`, `ended` and the prediction are those of the newest; `ended` is
    none while it goes on, or when it was killed. Of the steps only those count whose weights are not gone: a step that
    is done again takes back the older report of it, and those that came after.
    """

    started: RunStarted | None
    run: RecordedRun
    """What the newest start's config says."""
    ended: Ending | None
    steps: tuple[StepReport, ...]
    worker_s: float
    """Time of those steps on all workers, in seconds of one worker."""
    predicted: PlanPredicted | None
    as_predicted: tuple[StepReport, ...]
    """Steps since the prediction, for as long as the run kept the plan and the size it was made for."""
    requests: tuple[RequestServed, ...]

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole training, not the mean of the steps: long steps count by their length."""
        seconds = math.fsum(step.step_s for step in self.steps)
        return self.tokens / seconds if seconds > 0 else math.nan

    @property
    def tokens_per_worker_s(self) -> float:
        """The same for one worker."""
        return self.tokens / self.worker_s if self.worker_s > 0 else math.nan

    @property
    def cost(self) -> float:
        """Of all workers during the steps, in the currency of the config's price; 0: no price was given."""
        return cost(self.run.price_per_worker_hour, self.worker_s)

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
    started = next((b for b in bodies[newest:] if isinstance(b, RunStarted)), None)
    steps = _steps_that_count(bodies)
    predicted, as_predicted = _predicted(bodies[newest:])
    return Summary(
        started=started,
        run=recorded_run(started.config) if started is not None else RecordedRun(),
        ended=_ending(bodies[newest:]),
        steps=tuple(step for step, _ in steps),
        worker_s=math.fsum(step.step_s * workers for step, workers in steps),
        predicted=predicted,
        as_predicted=as_predicted,
        requests=tuple(b for b in bodies if isinstance(b, RequestServed)),
    )


def _steps_that_count(bodies: Sequence[EventBody]) -> list[tuple[StepReport, int]]:
    """(step, number of workers that did it)."""
    kept: list[tuple[StepReport, int]] = []
    workers = 1
    for body in bodies:
        match body:
            case RunStarted(config=config):
                run = recorded_run(config)
                workers = run.workers
                _take_back(kept, from_step=math.inf if run.resume else 0)
            case RunResized():
                workers = body.workers
            case RunRestarted(step=step):
                _take_back(kept, from_step=step + 1)
            case StepReport(step=step):
                _take_back(kept, from_step=step)
                kept.append((body, workers))
            case _:
                pass
    return kept


def _take_back(kept: list[tuple[StepReport, int]], from_step: float) -> None:
    while kept and kept[-1][0].step >= from_step:
        kept.pop()


def _predicted(bodies: Sequence[EventBody]) -> tuple[PlanPredicted | None, tuple[StepReport, ...]]:
    predicted, steps, holds = None, list[StepReport](), False
    for body in bodies:
        match body:
            case PlanPredicted():
                predicted, holds = body, True
                steps.clear()
            case PlanSteppedDown() | RunResized():
                holds = False
            case StepReport() if holds:
                steps.append(body)
            case _:
                pass
    return predicted, tuple(steps)


def _ending(bodies: Sequence[EventBody]) -> Ending | None:
    """The last end that nothing followed: a run that stops to change its size says that it stopped, and goes on.

    What fails after a run has finished does not undo that.
    """
    if (finished := next((body for body in bodies if isinstance(body, RunFinished)), None)) is not None:
        return finished
    last = next((body for body in reversed(bodies) if isinstance(body, (*_GOES_ON, *_ENDINGS))), None)
    return last if isinstance(last, _ENDINGS) else None


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank); NaN of nothing.

    Nearest rank, not interpolation: every percentile in a report is a time that somebody really waited.
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]
