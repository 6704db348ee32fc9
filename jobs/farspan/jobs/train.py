"""The training job: attempts at one run, one after another, until it is done or cannot go on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError, ConfigError, ModelError, OutOfMemoryError, PlanError
from farspan.jobs.attempt import AttemptLost, run_attempt
from farspan.jobs.metrics import RunMetrics
from farspan.jobs.progress import StopWish
from farspan.jobs.restart import Failure, RestartBudget
from farspan.jobs.room import RoomWatch, find_room
from farspan.storage.patience import patiently
from farspan.telemetry.events import (
    EventBody,
    Note,
    PlanPredicted,
    PlanSteppedDown,
    RunFinished,
    RunResized,
    RunRestarted,
    RunStarted,
)
from farspan.train.checkpoint import clear_checkpoints, newest_step
from farspan.train.elastic import Size, at_size, legal_sizes
from farspan.train.hdp_cost import forget_cost
from farspan.train.ladder import Ladder, Rung
from farspan.train.rescue import clear_rescue


def run_training(
    config: RunConfig,
    plan_lines: list[tuple[str, str]],
    tell: Callable[[EventBody], None],
    wish: StopWish | None = None,
    predicted: PlanPredicted | None = None,
    *,
    own_ray: bool = False,
) -> str | None:
    """Run the job on the Ray this process is connected to; gives the URI of the published model.

    `own_ray`: this process started it for itself (`local_ray`), so what Ray does for clusters is left out.

    None: `wish` was granted, a checkpoint was published and the next start goes on from it.

    Raises:
        FarspanError: what stopped the run, as the worker raised it.
    """
    plan = "\n".join(f"{what}: {text}" for what, text in plan_lines)
    with RunMetrics(config.name) as metrics:
        tell(RunStarted(config=dump_config(config), plan=plan))
        if predicted is not None:
            metrics.record(predicted)
            tell(predicted)
        if not config.train.resume:
            _start_over(config, tell)
        return _Attempts(config, plan, tell, wish or StopWish(), metrics, own_ray).run()


def _start_over(config: RunConfig, tell: Callable[[EventBody], None]) -> None:
    """Remove what an earlier run left: after a lost worker this one must not go on from it."""
    clear_rescue(config.output)
    forget_cost(config.output)
    count = clear_checkpoints(config.output)
    if count > 0:
        tell(Note(text=f"train.resume=false: {count} checkpoints of an earlier run were removed"))


@dataclass
class _Attempts:
    config: RunConfig
    plan: str
    tell: Callable[[EventBody], None]
    wish: StopWish
    metrics: RunMetrics
    own_ray: bool
    _finished: bool = False

    def __post_init__(self) -> None:
        config = copy.deepcopy(self.config)
        # What there is to go on from is this run's own.
        config.train.resume = True
        self._ladder = Ladder(config)
        self._budget, self._restarts = RestartBudget(config.train.max_restarts), 0
        self._trouble: OutOfMemoryError | None = None
        self._workers = config.parallel.workers
        self._begun = False

    def run(self) -> str | None:
        while not self._finished and self.wish.reason is None:
            try:
                self._attempt()
            except AttemptLost as lost:
                self._restart(lost.failure)
            except OutOfMemoryError as problem:
                self._trouble = problem
                self._step_down(problem, self._ladder.down() if self.config.memory.step_down else None)
            except (ConfigError, ModelError, PlanError):
                if self._trouble is None:
                    raise
                # This model does not allow what the last rung asked for.
                self._step_down(self._trouble, self._ladder.other())
        return f"{self.config.output.rstrip('/')}/model" if self._finished else None

    def _attempt(self) -> None:
        config = self._ladder.config
        sizes = legal_sizes(config)
        size = find_room(config, sizes, again=self._begun)
        self._begun = True
        if self._workers != size.workers:
            self._tell_size(size, sizes)
        self._workers = size.workers
        wish = StopWish(self.wish)
        larger = [other for other in sizes if other.workers > size.workers]
        with RoomWatch(config, size, larger, wish) as watch:

            def hear(body: EventBody) -> None:
                watch.heard()
                self._hear(body)

            run_attempt(at_size(config, size), self.plan, hear, wish, own_ray=self.own_ray)

    def _tell_size(self, size: Size, sizes: list[Size]) -> None:
        why = "all that were asked for have room" if size == sizes[0] else f"no room for {sizes[0].workers}"
        self._hear(
            RunResized(step=self._newest_step(), workers=size.workers, accumulation=size.accumulation, reason=why)
        )

    def _newest_step(self) -> int:
        output = self.config.output
        return patiently(lambda: newest_step(output), output, self.config.resources.timeout_s)

    def _hear(self, body: EventBody) -> None:
        self._finished = self._finished or isinstance(body, RunFinished)
        self.metrics.record(body)
        self.tell(body)

    def _step_down(self, problem: OutOfMemoryError, rung: Rung | None) -> None:
        if rung is None:
            raise problem
        self._hear(PlanSteppedDown(step=problem.step, reason=str(problem), change=rung.text))

    def _restart(self, failure: Failure) -> None:
        why_not = self._budget.refusal(failure, time.monotonic())
        if why_not is not None:
            raise ClusterError(
                f"training stopped after step {failure.step}: {failure.reason}; not started again: {why_not}"
            )
        step = self._newest_step()
        self._restarts += 1
        redone = max(0, failure.step - step)
        self._hear(RunRestarted(step=step, redone=redone, reason=failure.reason, restarts=self._restarts))
