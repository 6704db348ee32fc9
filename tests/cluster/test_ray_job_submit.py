"""The `ray job submit` of the documentation, as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY, small_corpus
from tests.support.local_ray import LocalRay, own_python_first
from tests.support.runs import tiny_run

from farspan.cli.main import run
from farspan.cluster.environment import AUTH, HABITS
from farspan.config.load import dump_config
from farspan.telemetry.events import RunFinished, RunStarted, StepReport, read_events

_ADDRESS = "http://127.0.0.1:8265"
_DEADLINE_S = 300


def documented() -> str:
    """The one command of the page, with its line breaks."""
    page = (REPOSITORY / "docs" / "how-to" / "train.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ ((?:\w+=\S+ )*ray job submit (?:.*\\\n)*.*)$", page, flags=re.MULTILINE)
    return str(command)


def typed(cluster: LocalRay, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell makes of it in `folder`, on a machine where nothing was set up but farspan and the token."""
    command = documented()
    assert command.count(_ADDRESS) == 1
    with own_python_first():
        plain = {name: value for name, value in os.environ.items() if name not in (*AUTH, *HABITS, "RAY_ADDRESS")}
        return subprocess.run(
            ["bash", "-c", command.replace(_ADDRESS, cluster.dashboard)],
            cwd=folder, env=plain, capture_output=True, text=True, timeout=_DEADLINE_S,
        )  # fmt: skip


@pytest.mark.long
def test_the_documented_ray_job_submit_trains_and_farspan_sees_its_job(
    ray_cluster: LocalRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(small_corpus(tmp_path), str(tmp_path / "run"), "train.steps=2", "model.dtype=float32")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    answer = typed(ray_cluster, tmp_path / "work")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"
    assert (model / "model.safetensors").is_file()
    bodies = [event.body for event in read_events(tmp_path / "run" / "events.jsonl").events]
    assert isinstance(bodies[0], RunStarted)
    assert [body.step for body in bodies if isinstance(body, StepReport)] == [1, 2]
    assert isinstance(bodies[-1], RunFinished)

    (job,) = set(re.findall(r"raysubmit_\w+", answer.stdout))
    here = ["--cluster", ray_cluster.dashboard]
    assert run(["jobs", "list", "--json", *here]) == 0
    listed = {entry["id"]: entry["status"] for entry in json.loads(capsys.readouterr().out)}
    assert listed[job] == "SUCCEEDED"
    assert run(["jobs", "logs", job, *here]) == 0
    assert f"model published: {model}" in capsys.readouterr().out
    assert run(["jobs", "describe", job, *here]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["entrypoint"] == "python -m farspan.cli.main train run.yaml --join"
    assert described["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90"}


@pytest.mark.long
def test_a_run_whose_output_would_go_with_rays_copy_of_the_folder_is_refused(
    ray_cluster: LocalRay, tmp_path: Path
) -> None:
    config = dump_config(tiny_run(small_corpus(tmp_path), "runs/mine"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run.yaml").write_text(config, encoding="utf-8")
    answer = typed(ray_cluster, tmp_path / "work")
    assert answer.returncode != 0
    assert re.search(
        r"error: output: must outlive .*, got '/.*/runs/mine'; use an absolute path or s3://", answer.stdout
    )
