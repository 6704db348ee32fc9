"""Hand a training run to a running Ray cluster through its job API, with farspan's wheel in the runtime environment."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError
from farspan.jobs.launch import ray_environment
from farspan.jobs.wheel import build_wheel

_POLL_S = 1.0
_MISSED_POLLS = 30
_AGENTS_S = 60.0
STOP_S = 90
"""Seconds a stopped job has to publish its checkpoint before it is killed."""


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster."""

    client: JobSubmissionClient
    job_id: str


def submit_training(config: RunConfig, address: str) -> Submitted:
    """Submit `config` to the cluster whose dashboard listens at `address` (http://HOST:8265).

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
    """
    with ray_environment(), tempfile.TemporaryDirectory(prefix="farspan-submit-") as scratch:
        folder = Path(scratch) / "job"
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        wheel = build_wheel(Path(scratch))
        try:
            client = JobSubmissionClient(address)
            job_id = _submit(
                client,
                entrypoint=f"{_python(address)} -m farspan.cli.main train config.yaml --join",
                runtime_env={
                    "working_dir": str(folder),
                    "py_modules": [str(wheel)],
                    # Ray gives a stopped job 3 seconds; a last checkpoint takes longer.
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
                },
                metadata={"name": config.name},
            )
        except Exception as problem:
            raise _refused(address, "did not take the job", problem) from None
    return Submitted(client, job_id)


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job to a cluster that may have been started a moment ago, and whose agents are still on their way."""
    deadline = time.monotonic() + _AGENTS_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as problem:
            if "No available agent" not in str(problem) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def connect(address: str) -> JobSubmissionClient:
    """Ray's job client of the cluster whose dashboard listens at `address`.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
    """
    with ray_environment():
        try:
            return JobSubmissionClient(address)
        except Exception as problem:
            raise _refused(address, "does not answer", problem) from None


def _refused(address: str, what: str, problem: Exception) -> ClusterError:
    # Ray reports every failure here as some RuntimeError, ConnectionError or requests error.
    reason = " ".join(str(problem).split())[:300]
    return ClusterError(
        f"{address} {what}: {reason}; give the dashboard's address "
        "(http://HOST:8265) and the cluster's token (`ray get-auth-token`)"
    )


def is_this_machine(address: str) -> bool:
    """Whether a dashboard address is on the loopback interface."""
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def _python(address: str) -> str:
    # A cluster's image has its Python first in PATH; this machine's PATH may lead to any other.
    return sys.executable if is_this_machine(address) else "python"


def follow(job: Submitted, tell: Callable[[str], None]) -> None:
    """Print a job's log as it grows, until it ends. Stopping to watch does not stop the job.

    Raises:
        ClusterError: the job failed, or the cluster no longer answers.
    """
    shown, missed = 0, 0
    while True:
        try:
            status, log = job.client.get_job_status(job.job_id), job.client.get_job_logs(job.job_id)
            missed = 0
        except Exception as problem:
            missed += 1
            if missed > _MISSED_POLLS:
                raise ClusterError(f"the cluster no longer answers about job {job.job_id}: {problem}") from None
            time.sleep(_POLL_S)
            continue
        for line in log[shown:].splitlines():
            tell(line)
        shown = len(log)
        if status == JobStatus.SUCCEEDED:
            return
        if status.is_terminal():
            raise ClusterError(f"job {job.job_id} ended as {status}; its log is above")
        time.sleep(_POLL_S)
