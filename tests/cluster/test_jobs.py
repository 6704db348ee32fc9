"""Jobs on a real local Ray: submission with the package, workers, errors that cross processes."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env.packaging import get_uri_for_directory
from tests.support.corpus import REPOSITORY, small_corpus
from tests.support.local_ray import LocalRay
from tests.support.runs import tiny_run

from farspan.cli.main import run
from farspan.config.load import dump_config
from farspan.errors import ClusterError, ConfigError, CorruptDataError, OutOfMemoryError
from farspan.jobs.facts import ask_cluster
from farspan.jobs.jobs import list_jobs
from farspan.jobs.package import lay_out, package_files
from farspan.jobs.submit import Submitted, connect, follow, submit_command, submit_training
from farspan.jobs.train import run_training
from farspan.telemetry.events import (
    CheckpointPublished,
    EventBody,
    PlanSteppedDown,
    RunFinished,
    RunStarted,
    StepReport,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("jobs"))


def test_the_standard_platform_module_is_not_shadowed_in_a_ray_worker(ray_cluster: LocalRay) -> None:
    @ray.remote
    def version() -> str:
        import platform

        return platform.python_version()

    assert ray.get(version.remote(), timeout=60) == platform.python_version()


def test_a_driver_without_the_token_is_refused(ray_cluster: LocalRay, tmp_path: Path) -> None:
    script = f"import ray; ray.init(address={ray_cluster.gcs_address!r}, logging_level='ERROR')"
    # Who is refused asks again every second, 20 times if nobody says otherwise.
    stranger = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    environment = {**os.environ, **stranger}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode != 0
    assert "AuthenticationError" in answer.stderr


def test_a_run_on_two_workers_tells_every_step_and_publishes_its_model(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    events: list[EventBody] = []
    config = tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=2", "parallel.sp=2", "model.dtype=float32")
    uri = run_training(config, [("mesh", "dp 1 x sp 2")], events.append)
    kinds = [type(event) for event in events]
    assert kinds == [RunStarted, *[StepReport] * 4, CheckpointPublished, RunFinished]
    steps = [event for event in events if isinstance(event, StepReport)]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    # Four steps on other tokens each: what a model learns by them shows elsewhere.
    assert len({step.loss for step in steps}) == 4
    assert (Path(uri) / "model.safetensors").is_file()


@pytest.mark.long
def test_a_run_that_does_not_fit_its_memory_goes_on_with_smaller_tiles(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    """The logits of 4096 tokens are 1 GiB, and so is their gradient."""
    tight = ["data.sequence_tokens=4096", "train.loss_tile_tokens=4096", "memory.limit_gib=1.75"]
    big = [*tight, "model.dtype=float32", "model.settings.num_hidden_layers=1", "train.steps=2"]
    events: list[EventBody] = []
    config = tiny_run(corpus, str(tmp_path / "run"), *big, vocab_size=65536)
    run_training(config, [], events.append)
    (stepped,) = [event for event in events if isinstance(event, PlanSteppedDown)]
    assert stepped.step == 1
    assert "rank 0 ran out of memory in step 1" in stepped.reason
    assert "loss tiles 4096 -> 2048 tokens" in stepped.change
    assert [event.step for event in events if isinstance(event, StepReport)] == [1, 2]
    assert isinstance(events[-1], RunFinished)


@pytest.mark.long
def test_a_run_that_may_not_step_down_says_what_it_lacked(ray_cluster: LocalRay, corpus: str, tmp_path: Path) -> None:
    tight = ["memory.limit_gib=0.01", "memory.step_down=false", "data.sequence_tokens=4096"]
    config = tiny_run(corpus, str(tmp_path / "run"), *tight, "train.loss_tile_tokens=4096", vocab_size=65536)
    with pytest.raises(OutOfMemoryError, match="rank 0 ran out of memory in step 1"):
        run_training(config, [], lambda event: None)


@pytest.mark.long
def test_an_error_a_worker_raises_on_purpose_arrives_as_itself(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), vocab_size=17)
    with pytest.raises(ConfigError, match=r"must know the corpus's 300 tokens, got 'vocab_size 17'"):
        run_training(config, [], lambda event: None)


def test_workers_that_do_not_fit_are_refused_within_the_deadline(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    config = tiny_run(corpus, str(tmp_path / "run"), "resources.cpus_per_worker=64", "resources.timeout_s=3")
    with pytest.raises(ClusterError, match=r"no room for 1 workers of {'CPU': 64.0} within resources.timeout_s=3"):
        run_training(config, [], lambda event: None)


@pytest.mark.long
def test_a_corrupt_shard_stops_the_run_with_its_name(ray_cluster: LocalRay, tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    (shard,) = (tmp_path / "corpus" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    with pytest.raises(CorruptDataError, match=rf"{shard.name} is not the file that was built"):
        run_training(tiny_run(corpus, str(tmp_path / "run")), [], lambda event: None)


def test_a_submitted_job_runs_the_shipped_package_and_its_log_is_followed(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = tiny_run(corpus, str(tmp_path / "run"), "train.steps=2", "model.dtype=float32")
    job = submit_training(config, ray_cluster.dashboard)
    follow(job, lines.append)
    log = "\n".join(lines)
    assert "step     2/2" in log
    assert f"model published: {tmp_path / 'run' / 'model'}" in log
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "llama"
    package, info = lay_out(tmp_path)
    assert job.client.get_job_info(job.job_id).runtime_env["py_modules"] == [
        get_uri_for_directory(str(folder), include_gitignore=True) for folder in (package, info)
    ]


def test_two_jobs_that_bring_new_code_to_a_node_at_once_both_run_it(
    ray_cluster: LocalRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [*package_files(), ("farspan/new_code.py", b"")]
    monkeypatch.setattr("farspan.jobs.package.package_files", lambda: iter(changed))

    def help_of(name: str) -> list[str]:
        lines: list[str] = []
        # Different files beside the code make different environments of them.
        follow(submit_command(ray_cluster.dashboard, "--help", {"name": name}, name), lines.append)
        return lines

    with ThreadPoolExecutor() as threads:
        one, other = threads.map(help_of, ["one", "other"])
    for lines in (one, other):
        assert any("Usage: python -m farspan.cli.main" in line for line in lines)


def test_a_job_that_fails_says_so(ray_cluster: LocalRay, tmp_path: Path) -> None:
    lines: list[str] = []
    job = submit_training(tiny_run(str(tmp_path / "nowhere"), str(tmp_path / "run")), ray_cluster.dashboard)
    with pytest.raises(ClusterError, match=rf"job {job.job_id} ended as FAILED"):
        follow(job, lines.append)
    assert f"{tmp_path / 'nowhere'}: no corpus is there; run `farspan data build`" in "\n".join(lines)


def test_a_job_that_never_starts_says_why(ray_cluster: LocalRay) -> None:
    client = connect(ray_cluster.dashboard)
    job = client.submit_job(entrypoint="true", runtime_env={"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"})
    with pytest.raises(ClusterError, match=r"ended as FAILED \(.*_ray_pkg_0123456789abcdef"):
        follow(Submitted(client, job), lambda line: None)


def test_an_address_where_nobody_listens_is_one_sentence(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"did not take the job: .*give the dashboard's address"):
        submit_training(tiny_run(corpus, str(tmp_path / "run")), "http://127.0.0.1:9")


@pytest.mark.long
def test_the_command_line_submits_too(ray_cluster: LocalRay, corpus: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {settings: {hidden_size: 32, num_hidden_layers: 1}}\n")
    overrides = [f"data.corpus={corpus}", f"output={tmp_path / 'run'}", "data.sequence_tokens=64", "train.steps=1"]
    answer = subprocess.run(
        [sys.executable, "-m", "farspan.cli.main", "train", "run.yaml", *overrides, "--cluster", ray_cluster.dashboard],
        cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    before, _, after = answer.stdout.partition("submitted raysubmit_")
    assert re.search(r"machine +1 x cpu of .* \(memory as the cluster's nodes \(1 with room\) say; speeds are", before)
    assert re.search(r"peak memory +.* per process predicted", before)
    for what in ("step", "breaks first"):
        assert f"  {what:16} " in before
    assert "step     1/1" in after
    assert REPOSITORY.exists()


def test_what_can_never_be_placed_is_refused_before_it_is_submitted(
    ray_cluster: LocalRay, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ray's monitor says so after its first look.
    ends = time.monotonic() + 60
    while (seen := ask_cluster(ray_cluster.dashboard)) is None or seen.grows is None:
        assert time.monotonic() < ends
        time.sleep(0.2)
    (node,) = seen.nodes
    assert (seen.grows, node.resources["CPU"]) == (False, 4)
    before = len(list_jobs(ray_cluster.dashboard))
    (tmp_path / "run.yaml").write_text(dump_config(tiny_run(corpus, str(tmp_path / "run"), "parallel.workers=5")))
    assert run(["train", str(tmp_path / "run.yaml"), "--cluster", ray_cluster.dashboard]) == 2
    said = capsys.readouterr()
    assert "peak memory" in said.out
    assert (
        "error: parallel.workers: must find room on the cluster's nodes, which have it for 4 workers of 1 CPU, got 5; "
        "ask for at most 4, or add nodes first\n" in said.err
    )
    assert len(list_jobs(ray_cluster.dashboard)) == before
