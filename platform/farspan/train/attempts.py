"""A run as one attempt after another: each that ran out of memory is followed by one with a plan that needs less."""

from __future__ import annotations

from collections.abc import Callable

from farspan.config.schema import RunConfig
from farspan.errors import ConfigError, ModelError, OutOfMemoryError, PlanError
from farspan.telemetry.events import CheckpointPublished, EventBody, PlanSteppedDown
from farspan.train.checkpoint import newest_step
from farspan.train.ladder import Ladder, Rung
from farspan.train.rescue import clear_rescue

Tell = Callable[[EventBody], None]
Attempt = Callable[[RunConfig, Tell], str]


def run_until_it_fits(config: RunConfig, attempt: Attempt, tell: Tell) -> str:
    """What `attempt` gives for the first plan, from `config` downwards, that does not run out of memory.

    Raises:
        FarspanError: what stopped the last attempt.
    """
    published: list[int] = []

    def note(event: EventBody) -> None:
        if isinstance(event, CheckpointPublished):
            published.append(event.step)
        tell(event)

    if not config.train.resume:
        clear_rescue(config.output)
    ladder = Ladder(config)
    trouble: OutOfMemoryError | None = None
    while True:
        try:
            return attempt(ladder.config, note)
        except OutOfMemoryError as problem:
            trouble, rung = problem, ladder.down() if config.memory.step_down else None
        except (ConfigError, ModelError, PlanError):
            if trouble is None:
                raise
            # This model does not allow what the last rung asked for.
            rung = ladder.other()
        if rung is None:
            raise trouble
        if published and newest_step(config.output) == published[-1]:
            # A run that was to start over did so already: its own checkpoints are gone on from.
            ladder.config.train.resume = True
        tell(_stepped_down(trouble, rung))


def _stepped_down(problem: OutOfMemoryError, rung: Rung) -> PlanSteppedDown:
    return PlanSteppedDown(step=problem.step, reason=str(problem), change=rung.text)
