"""A run is tried again with lower plans, and goes on from what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.runs import tiny_run

from farspan.config.schema import RunConfig
from farspan.errors import ModelError, OutOfMemoryError, TierFullError
from farspan.storage.publish import publish_folder
from farspan.telemetry.events import CheckpointPublished, EventBody, PlanSteppedDown
from farspan.train.attempts import Tell, run_until_it_fits
from farspan.train.rescue import is_out_of_memory


def publish(output: str, step: int, scratch: Path) -> CheckpointPublished:
    (scratch / "files").mkdir(exist_ok=True)
    (scratch / "files" / "weights").write_text(str(step))
    uri = f"{output}/checkpoints/step-{step:08d}"
    publish_folder(scratch / "files", uri)
    return CheckpointPublished(step=step, uri=uri, seconds=1.0, bytes=1)


@pytest.mark.parametrize(("older", "resumed"), [(None, True), (1, True), (100, False)])
def test_a_run_that_starts_over_goes_on_from_its_own_checkpoint_and_from_no_older_run(
    tmp_path: Path, older: int | None, resumed: bool
) -> None:
    config = tiny_run("nowhere", str(tmp_path / "run"), "train.resume=false")
    if older is not None:
        publish(config.output, older, tmp_path)
    tried: list[RunConfig] = []

    def attempt(config: RunConfig, tell: Tell) -> str:
        tried.append(config)
        if len(tried) == 1:
            tell(publish(config.output, 2, tmp_path))
            raise OutOfMemoryError(0, 3, "no 3 GiB left")
        return "done"

    events: list[EventBody] = []
    assert run_until_it_fits(config, attempt, events.append) == "done"
    assert [plan.train.resume for plan in tried] == [False, resumed]
    assert [type(event) for event in events] == [CheckpointPublished, PlanSteppedDown]


def test_a_plan_the_model_refuses_is_followed_by_another_and_the_first_trouble_is_told_at_last(tmp_path: Path) -> None:
    config = tiny_run("nowhere", str(tmp_path / "run"))
    tried: list[RunConfig] = []

    def attempt(config: RunConfig, tell: Tell) -> str:
        tried.append(config)
        if len(tried) == 1:
            raise OutOfMemoryError(0, 1, "no 3 GiB left")
        raise ModelError("cannot")

    with pytest.raises(OutOfMemoryError, match="no 3 GiB left"):
        run_until_it_fits(config, attempt, lambda event: None)
    assert len(tried) > 2
    assert all(plan != config for plan in tried[1:])


@pytest.mark.parametrize(
    ("problem", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError("x"), True),
        (TierFullError("dram", "activations", 2, 1, 1), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_memory_that_did_not_suffice_is_told_apart_from_other_trouble(problem: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(problem) == is_memory
