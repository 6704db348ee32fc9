"""Hand a command to a running Ray cluster through its job API, with this farspan in the runtime environment."""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from farspan.config.load import dump_config
from farspan.config.schema import RunConfig
from farspan.errors import ClusterError
from farspan.jobs.launch import ray_environment
from farspan.jobs.package import lay_out

_POLL_S = 1.0
_MISSED_POLLS = 30
_AGENTS_S = 60.0
_ASK_S = 20
_MOST_NODES = 10_000
_REASON_CHARS = 2000
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
    return submit_command(address, "train config.yaml --join", {"config.yaml": dump_config(config)}, config.name)


def submit_command(address: str, command: str, files: dict[str, str], name: str) -> Submitted:
    """Let a cluster run `farspan` with the words of `command`, beside `files` (name to text); it gets this farspan.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
    """
    with ray_environment(), tempfile.TemporaryDirectory(prefix="farspan-submit-") as scratch:
        folder = Path(scratch) / "job"
        folder.mkdir()
        for file, text in files.items():
            # Ray keeps the mode, whenever it unpacks them; among them may be keys.
            (folder / file).touch(mode=0o600)
            (folder / file).write_text(text, encoding="utf-8")
        package = Path(scratch) / "package"
        package.mkdir()
        modules = [str(part) for part in lay_out(package)]
        try:
            client = JobSubmissionClient(address)
            job_id = _submit(
                client,
                entrypoint=f"{_python(address)} -m farspan.cli.main {command}",
                runtime_env={
                    "working_dir": str(folder),
                    "py_modules": modules,
                    # Ray gives a stopped job 3 seconds; a last checkpoint takes longer.
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
                },
                metadata={"name": name},
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
    """Whether the head of the cluster behind a dashboard address runs on this machine.

    A loopback address alone does not say so: `ray dashboard` forwards that of a cluster far away. Where the cluster
    does not answer, the address decides; what is submitted next tells the reason.
    """
    if urlsplit(address).hostname not in ("127.0.0.1", "localhost", "::1"):
        return False
    head = head_of(address)
    return head is None or _is_own(head)


def head_of(address: str) -> str | None:
    """What the head of a cluster calls its own address; None where the cluster does not say."""
    with ray_environment():
        try:
            nodes = list_nodes(address, limit=_MOST_NODES, timeout=_ASK_S, raise_on_missing_output=False)
        except Exception:
            # Ray reports every failure here as some RuntimeError, ConnectionError or requests error.
            return None
    return next((str(node.node_ip) for node in nodes if node.is_head_node), None)


def _is_own(host: str) -> bool:
    """Whether an address is one of this machine's: only those can be listened on."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def _python(address: str) -> str:
    # A cluster's image has its Python first in PATH; this machine's PATH may lead to any other.
    return sys.executable if is_this_machine(address) else "python"


def wait_for_line(job: Submitted, start: str, tell: Callable[[str], None]) -> str:
    """Tell a job's log as it grows until a line begins with `start`; gives that line. The job goes on.

    Raises:
        ClusterError: the job ended without saying so, or the cluster no longer answers.
    """
    for line in _lines(job):
        if line.startswith(start):
            return line
        tell(line)
    raise ClusterError(f"job {job.job_id} ended before it said {start!r}; its log is above")


def follow(job: Submitted, tell: Callable[[str], None]) -> None:
    """Print a job's log as it grows, until it ends. Stopping to watch does not stop the job.

    Raises:
        ClusterError: the job failed, or the cluster no longer answers.
    """
    for line in _lines(job):
        tell(line)


def _lines(job: Submitted) -> Iterator[str]:
    """The whole lines of a job's log, until it succeeds; a job that fails is a ClusterError after its last line."""
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
        # Half a line is shown when the rest of it is there.
        whole = len(log) if status.is_terminal() else log.rfind("\n") + 1
        yield from log[shown:whole].splitlines()
        shown = max(shown, whole)
        if status == JobStatus.SUCCEEDED:
            return
        if status.is_terminal():
            where = "its log is above" if shown else "it left no log"
            raise ClusterError(f"job {job.job_id} ended as {status}{_reason(job)}; {where}")
        time.sleep(_POLL_S)


def _reason(job: Submitted) -> str:
    """What Ray says of a job's end. A job that never began has no log: this is all that is told of it."""
    try:
        said = job.client.get_job_info(job.job_id).message or ""
    except Exception:
        # Ray reports every failure here as some RuntimeError or requests error; the job's end is told without.
        return ""
    # After these words Ray repeats the log.
    words = " ".join(said.partition("last available logs")[0].split()).rstrip(", .")
    return f" ({words[:_REASON_CHARS]})" if words else ""
