"""Whose machine a cluster runs on, which token it is sent, and when a job has said what was waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobDetails

from farspan.jobs import submit
from farspan.jobs.submit import Submitted, follow, is_this_machine, wait_for_line


@pytest.mark.parametrize(
    ("address", "head", "here"),
    [
        ("http://127.0.0.1:8265", "127.0.0.1", True),
        ("http://localhost:8265", "127.0.0.1", True),
        # `ray dashboard` forwards a head far away to this machine's loopback.
        ("http://127.0.0.1:8265", "192.0.2.7", False),
        ("http://127.0.0.1:8265", None, True),
        ("http://192.0.2.7:8265", "127.0.0.1", False),
    ],
)
def test_a_cluster_is_on_this_machine_when_its_head_has_one_of_its_addresses(
    address: str, head: str | None, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "head_of", lambda address: head)
    assert is_this_machine(address) is here


def test_a_cluster_that_does_not_answer_has_no_head() -> None:
    assert submit.head_of("http://127.0.0.1:9") is None


_MODE = """
from farspan.jobs.launch import ray_environment
from ray._private.authentication.authentication_utils import is_token_auth_enabled
import os
with ray_environment():
    print(is_token_auth_enabled(), os.environ.get("RAY_AUTH_MODE"))
print(os.environ.get("RAY_AUTH_MODE"))
"""


@pytest.mark.parametrize(
    ("token", "mode", "said"),
    [(True, None, "True token None"), (False, None, "False None None"), (True, "disabled", "False disabled disabled")],
)
def test_a_token_that_is_there_is_used_unless_the_user_said_otherwise(
    token: bool, mode: str | None, said: str, tmp_path: Path
) -> None:
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("a" * 64, encoding="ascii")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), **({} if mode is None else {"RAY_AUTH_MODE": mode})}
    answer = subprocess.run(
        [sys.executable, "-c", _MODE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.stdout.split() == said.split(), answer.stderr


class _Job:
    """A job server that tells one log, a piece at each question."""

    def __init__(self, *logs: str, end: str) -> None:
        self._logs, self._asked, self._end = list(logs), 0, end

    def get_job_status(self, job: str) -> submit.JobStatus:
        last = self._asked + 1 >= len(self._logs)
        return submit.JobStatus(self._end) if last else submit.JobStatus.RUNNING

    def get_job_info(self, job: str) -> JobDetails:
        return JobDetails(
            type="SUBMISSION", entrypoint="train", status=submit.JobStatus(self._end), message="the node died"
        )

    def get_job_logs(self, job: str) -> str:
        log = self._logs[min(self._asked, len(self._logs) - 1)]
        self._asked += 1
        return log


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.0)


@pytest.mark.usefixtures("quickly")
def test_a_line_is_waited_for_as_a_whole_and_what_comes_before_it_is_told() -> None:
    told: list[str] = []
    job = Submitted(_Job("starting\nrea", "starting\nready: http://x\nmore\n", "", end="RUNNING"), "j")  # type: ignore[arg-type]
    assert wait_for_line(job, "ready: ", told.append) == "ready: http://x"
    assert told == ["starting"]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(("end", "said"), [("FAILED", "job j ended as FAILED"), ("SUCCEEDED", "ended before it said")])
def test_a_job_that_ends_without_the_line_is_an_error_and_its_log_is_told(end: str, said: str) -> None:
    told: list[str] = []
    job = Submitted(_Job("starting\n", "starting\nerror: no model\nhalf a line", end=end), "j")  # type: ignore[arg-type]
    with pytest.raises(submit.ClusterError, match=said):
        wait_for_line(job, "ready: ", told.append)
    assert told == ["starting", "error: no model", "half a line"]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("end", ["FAILED", "STOPPED"])
def test_a_job_that_ends_without_a_word_says_what_ray_knows(end: str) -> None:
    with pytest.raises(submit.ClusterError, match=rf"job j ended as {end} \(the node died\); it left no log"):
        follow(Submitted(_Job("", end=end), "j"), lambda line: None)  # type: ignore[arg-type]
