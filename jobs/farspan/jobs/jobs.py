"""Jobs that were submitted to a cluster: which there are, what they say, and their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ray.job_submission import JobDetails, JobSubmissionClient

from farspan.errors import ClusterError, NotFoundError
from farspan.jobs.submit import STOP_S, Submitted, connect, follow

# Longer than a job is given to publish a last checkpoint.
_STOP_S, _POLL_S = STOP_S + 30.0, 0.5


@dataclass(frozen=True)
class Job:
    """One job as a reader wants it."""

    id: str
    name: str
    status: str
    started: str
    """UTC; empty before it started."""
    seconds: float
    message: str
    entrypoint: str
    metadata: dict[str, str]
    runtime_env: dict[str, Any]


def list_jobs(address: str) -> list[Job]:
    """Every submitted job the cluster knows, newest first.

    Raises:
        ClusterError: nobody answers at `address`.
    """
    found = _ask(address, connect(address).list_jobs)
    jobs = [job for job in found if job.submission_id is not None]
    return [_job(job) for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)]


def describe_job(address: str, job_id: str) -> Job:
    """One job.

    Raises:
        NotFoundError: the cluster knows no such job.
    """
    return _job(_details(connect(address), address, job_id))


def show_log(address: str, job_id: str, tell: Callable[[str], None], *, to_the_end: bool) -> None:
    """Tell a job's log line by line, as far as it goes, or until the job ends."""
    client = connect(address)
    _details(client, address, job_id)
    if to_the_end:
        follow(Submitted(client, job_id), tell)
        return
    for line in _ask(address, lambda: client.get_job_logs(job_id)).splitlines():
        tell(line)


def stop_job(address: str, job_id: str) -> Job:
    """Ask a job to stop, and wait until it did: it publishes a checkpoint first.

    Raises:
        ClusterError: it still runs after two minutes.
    """
    client = connect(address)
    if not _details(client, address, job_id).status.is_terminal():
        _ask(address, lambda: client.stop_job(job_id))
    ends = time.monotonic() + _STOP_S
    while not (details := _details(client, address, job_id)).status.is_terminal():
        if time.monotonic() > ends:
            raise ClusterError(f"job {job_id} still runs {_STOP_S:g} s after it was asked to stop; look at its log")
        time.sleep(_POLL_S)
    return _job(details)


def _details(client: JobSubmissionClient, address: str, job_id: str) -> JobDetails:
    known = {job.submission_id: job for job in _ask(address, client.list_jobs)}
    if job_id not in known:
        raise NotFoundError(address, f"knows no job {job_id!r}; `farspan jobs list` shows those it knows")
    return known[job_id]


def _ask(address: str, request: Callable[[], Any]) -> Any:
    try:
        return request()
    except Exception as problem:
        # Ray reports every failure here as some RuntimeError or requests error.
        raise ClusterError(f"{address} does not answer: {' '.join(str(problem).split())[:300]}") from None


def _job(details: JobDetails) -> Job:
    started, ended = details.start_time or 0, details.end_time or time.time() * 1000
    return Job(
        id=str(details.submission_id),
        name=(details.metadata or {}).get("name", ""),
        status=str(details.status.value),
        started=f"{datetime.fromtimestamp(started / 1000, tz=UTC):%Y-%m-%d %H:%M:%S}" if started else "",
        seconds=(ended - started) / 1000 if started else 0.0,
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=dict(details.metadata or {}),
        runtime_env=dict(details.runtime_env or {}),
    )
