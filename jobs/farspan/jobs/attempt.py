"""One attempt at a training run: Ray Train's controller and its workers, from start to whatever ends them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError, FarspanError
from farspan.jobs.interface import LinkedTorchConfig
from farspan.jobs.progress import EventWatcher, StopWish
from farspan.jobs.restart import Failure
from farspan.jobs.room import EveryNodeAnswers, RoomTold, UnreservedWorkers, room_given_back, worker_resources
from farspan.jobs.spare import spare_environment
from farspan.jobs.worker import train_worker
from farspan.storage.door import open_store
from farspan.storage.paths import join_uri
from farspan.telemetry.events import EventBody, StepReport

_ABORT_S = 30.0


class AttemptLost(Exception):
    """Workers, their node or their controller were lost: the run may go on from its newest checkpoint."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.reason)


def run_attempt(
    config: RunConfig, plan: str, tell: Callable[[EventBody], None], wish: StopWish, *, own_ray: bool = False
) -> None:
    """Run until the last step, or until `wish` is granted. `own_ray`: nobody else uses this Ray, and it cannot grow.

    Raises:
        FarspanError: what a worker raised on purpose.
        AttemptLost: what happened to the workers.
        KeyboardInterrupt: Ctrl-C; the workers were told to end.
    """
    newest = 0

    def count(body: EventBody) -> None:
        nonlocal newest
        newest = body.step if isinstance(body, StepReport) else newest
        tell(body)

    environment = spare_environment(config, ray.get_runtime_context().runtime_env)
    try:
        with EventWatcher(count, wish) as watcher:
            payload = {
                "config": dump_config(config),
                "plan": plan,
                "mailbox": watcher.mailbox,
                "spare": bool(environment),
            }
            trainer = _Trainer(
                train_worker,
                train_loop_config=payload,
                scaling_config=_scaling(config),
                backend_config=LinkedTorchConfig(backend=_backend(config), timeout_s=int(config.resources.timeout_s)),
                run_config=_ray_run(config, environment, RoomTold(watcher.mailbox)),
                own_ray=own_ray,
            )
            with _interrupts_kept(), room_given_back(watcher.mailbox):
                trainer.fit()
    except (ray.train.TrainingFailedError, RayActorError) as problem:
        raise verdict(problem, newest) from None


def verdict(problem: BaseException, newest_step: int) -> Exception:
    """What ended an attempt: an error raised on purpose, or a loss.

    When a process dies its partners fail too, with errors of their own, so a death speaks before them.
    """
    found = list(_all_within(problem))
    died = next((e for e in found if isinstance(e, RayActorError)), None)
    if died is not None:
        return AttemptLost(Failure(_first_words(died), newest_step, died=True))
    meant = next((e for e in found if isinstance(e, FarspanError)), None)
    if meant is not None:
        return meant
    if isinstance(problem, ray.train.ControllerError):
        return ClusterError(f"training failed: {problem}")
    deepest = next(iter(getattr(problem, "worker_failures", {}).values()), problem)
    return AttemptLost(Failure(_first_words(deepest), newest_step, died=False))


def _all_within(problem: BaseException) -> list[BaseException]:
    """An error and everything Ray wrapped in it, outermost first."""
    seen: list[BaseException] = []
    waiting: list[BaseException] = [problem]
    while waiting:
        current = waiting.pop(0)
        if any(current is one for one in seen):
            continue
        seen.append(current)
        waiting += getattr(current, "worker_failures", {}).values()
        waiting += [e for e in (current.__cause__, current.__context__, getattr(current, "cause", None)) if e]
    return seen


def _first_words(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    # Of a traceback that Ray carried over, the last line says what it was.
    words = lines[-1] if lines and "Traceback" in str(problem) else lines[0] if lines else ""
    return f"{type(problem).__name__}: {words[:200]}"


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Afterwards Ctrl-C means what it meant before: Ray Train leaves a handler that asks a controller which is gone."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may say what a signal means, and Ray Train keeps to that.
        yield
        return
    meant = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, meant)


# Each is a process that wakes a hundred times a second. We read our own data; room is given back by the driver.
_LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback)


class _Trainer(DataParallelTrainer):
    """Ray Train without processes that a run does not need, interrupted as every other command is."""

    def __init__(self, *what: Any, own_ray: bool, **settings: Any) -> None:
        super().__init__(*what, **settings)
        self._own_ray = own_ray

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [found for found in super()._create_default_callbacks() if not isinstance(found, _LEFT_OUT)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if self._own_ray:
            settings["scaling_policy"] = UnreservedWorkers(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)

    def _register_sigint_handler(self, controller: ray.actor.ActorHandle) -> None:
        """Ray Train's own handler ends the process with code 0, as if the run were done."""

        def interrupted(_signal: int, _frame: FrameType | None) -> None:
            # Who asks twice does not wait for the workers.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with suppress(RayError):
                ray.get(controller.abort.remote(), timeout=_ABORT_S)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupted)


def _scaling(config: RunConfig) -> ScalingConfig:
    return ScalingConfig(
        num_workers=config.parallel.workers,
        use_gpu=config.resources.gpus_per_worker > 0,
        resources_per_worker=worker_resources(config),
    )


def _backend(config: RunConfig) -> str:
    return "nccl" if config.resources.gpus_per_worker > 0 else "gloo"


def _ray_run(config: RunConfig, environment: dict[str, Any], told: RoomTold) -> RayRunConfig:
    # Ray Train keeps its own state beside the run; every node must reach it.
    files, path = open_store(join_uri(config.output, "ray")).arrow
    # To the microsecond: a second attempt must not find the first one's state.
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    # Restarts are the driver's: only it knows which errors were meant, and how many workers the next attempt gets.
    failures = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=3)
    return RayRunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=files,
        failure_config=failures,
        worker_runtime_env=environment,
        callbacks=[EveryNodeAnswers(config.resources.timeout_s), told],
    )
