"""`farspan jobs` against a real job server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.support.corpus import small_corpus
from tests.support.local_ray import LocalRay
from tests.support.runs import tiny_run

from farspan.cli.main import run
from farspan.jobs.submit import submit_training
from farspan.telemetry.events import RunPreempted, read_events
from farspan.train.checkpoint import list_steps


def wait_for_step(log: Path) -> None:
    """Until the run told of its first step, by following the file that is appended to."""
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        if log.is_file() and '"kind":"step"' in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("no step was told in time")


@pytest.mark.long
def test_a_job_is_listed_described_stopped_with_a_checkpoint_and_its_log_is_shown(
    ray_cluster: LocalRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_corpus(tmp_path)
    config = tiny_run(corpus, str(tmp_path / "run"), "train.steps=100000", "name=long")
    job = submit_training(config, ray_cluster.dashboard).job_id
    here = ["--cluster", ray_cluster.dashboard]
    wait_for_step(tmp_path / "run" / "events.jsonl")
    assert run(["jobs", "list", "--json", *here]) == 0
    listed = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert (listed[job]["name"], listed[job]["status"]) == ("long", "RUNNING")
    assert run(["jobs", "stop", job, *here]) == 0
    assert f"{job} STOPPED" in capsys.readouterr().out
    last = [event.body for event in read_events(tmp_path / "run" / "events.jsonl").events][-1]
    assert isinstance(last, RunPreempted)
    assert list_steps(config.output)[0] == last.step
    assert run(["jobs", "describe", job, *here]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "STOPPED"
    assert run(["jobs", "logs", job, *here]) == 0
    assert f"stopped after step {last.step}, checkpoint published: SIGTERM" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["logs", "stop", "describe"])
def test_a_job_nobody_submitted_is_one_sentence(
    ray_cluster: LocalRay, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["jobs", verb, "raysubmit_none", "--cluster", ray_cluster.dashboard]) == 2
    assert "knows no job 'raysubmit_none'; `farspan jobs list` shows those it knows" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "list", "--cluster", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9 does not answer" in said
    assert "Traceback" not in said
