"""Which runs keep a spare process beside each worker, and when they ask for it."""

from __future__ import annotations

import pytest
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from tests.support.runs import tiny_run

from farspan.jobs.spare import spare_environment, with_spare
from farspan.telemetry.events import EventBody, Note, StepReport


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["parallel.workers=2"], False),
        (["parallel.workers=2", "parallel.min_workers=1"], True),
        (["parallel.workers=2", "parallel.min_workers=1", "resources.gpus_per_worker=1"], False),
    ],
)
def test_spares_are_kept_where_a_run_goes_on_with_fewer_workers_and_none_has_a_gpu(
    overrides: list[str], kept: bool
) -> None:
    assert bool(spare_environment(tiny_run("corpus", "output", *overrides), {})) == kept


def test_a_hook_of_the_jobs_own_is_left_alone() -> None:
    config = tiny_run("corpus", "output", "parallel.workers=2", "parallel.min_workers=1")
    assert spare_environment(config, {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "theirs"}}) == {}


def test_the_spare_is_asked_for_once_and_after_the_first_step_was_told_of() -> None:
    said: list[str] = []

    def tell(body: EventBody) -> None:
        said.append(type(body).__name__)

    told = with_spare(tell, lambda: said.append("asked"))
    step = StepReport(
        step=1,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens=64,
        num_labels=63,
        step_s=1.0,
        tokens_per_s=64.0,
        peak_memory_bytes=0,
        bytes_sent=0,
    )
    for body in (Note(text="begun"), step, step):
        told(body)
    assert said == ["Note", "StepReport", "asked", "StepReport"]
