"""Many engines on Ray answer a file as one engine does, also when one of them dies."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from tests.support.local_ray import LocalRay
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.schema import EngineConfig
from farspan.engine.offline import OfflineEngine, Progress, run_offline
from farspan.engine.request import SamplingParams
from farspan.errors import CheckpointError, ClusterError
from farspan.jobs.batch import run_batch

CONFIG = EngineConfig(dtype="float64", kv_bytes=8 * 1024 * 1024, threads=1)
PARAMS = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


def _prompts(path: Path, count: int) -> Path:
    lines = [json.dumps({"id": f"p{n}", "prompt": f"def function_{n % 7}(value_{n}):"}) for n in range(count)]
    lines[5] = "{torn"
    path.write_text("\n".join(lines))
    return path


def _tokens(path: Path) -> dict[object, object]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["id"] or record["line"]: record.get("tokens") for record in records}
    assert len(found) == len(records), "a line was answered twice"
    return found


def _engine_processes() -> list[int]:
    """Process ids of the engines of this test's Ray."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"ray::_Worker" in command:
                found.append(int(folder.name))
    return found


def test_two_engines_answer_what_one_answers_also_when_one_is_killed(
    ray_cluster: LocalRay, model: Path, tmp_path: Path
) -> None:
    prompts = _prompts(tmp_path / "in.jsonl", 200)
    run_offline(OfflineEngine.open(model, CONFIG), prompts, tmp_path / "one.jsonl", PARAMS, lambda _: None)
    killed: list[int] = []

    def tell(progress: Progress) -> None:
        if progress.answered and not killed:
            killed.append(_engine_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    # Guesses change no answer.
    drafted = replace(CONFIG, draft_model=str(model), draft_tokens=2)
    progress = run_batch(str(model), drafted, prompts, tmp_path / "two.jsonl", PARAMS, 2, tell)
    assert killed, "nobody was killed"
    # The model itself is right but for what it guesses beyond the end of an answer.
    assert progress.drafted.accepted > max(199, 0.9 * progress.drafted.proposed)
    assert (progress.answered, progress.failed) == (199, 1)
    expected = _tokens(tmp_path / "one.jsonl")
    assert len({token for tokens in expected.values() for token in tokens or []}) >= 6
    assert _tokens(tmp_path / "two.jsonl") == expected
    again = run_batch(str(model), CONFIG, prompts, tmp_path / "two.jsonl", PARAMS, 1, lambda _: None)
    assert (again.skipped, again.answered, again.failed) == (199, 0, 1)


def test_a_model_that_engines_cannot_run_is_told_of_once(ray_cluster: LocalRay, model: Path, tmp_path: Path) -> None:
    prompts = _prompts(tmp_path / "in.jsonl", 10)
    too_small = EngineConfig(dtype="float64", kv_bytes=1024, threads=1)
    with pytest.raises(ClusterError, match=r"engine\.kv_bytes"):
        run_batch(str(model), too_small, prompts, tmp_path / "out.jsonl", PARAMS, 1, lambda _: None)
    with pytest.raises(CheckpointError):
        run_batch(str(tmp_path), CONFIG, prompts, tmp_path / "other.jsonl", PARAMS, 1, lambda _: None)
    assert ray.is_initialized()
