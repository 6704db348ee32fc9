"""`farspan cluster watch-spot`: on a node, wait for EC2's notice and let Ray leave the node before EC2 does.

A drained node gets no new task, actor or replica; Serve starts those it has elsewhere, and the autoscaler a new node.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx

from farspan.cluster.spot import (
    NOTICE_PATH,
    TOKEN_HEADER,
    TOKEN_PATH,
    TOKEN_TTL,
    SpotNotice,
    read_notice,
    seconds_left,
)
from farspan.errors import ClusterError

METADATA = "http://169.254.169.254"
_ANSWER_S = 2.0
_DRAIN_S = 30.0

Tell = Callable[[str], None]


def watch_spot(metadata: str, poll_s: float, tell: Tell) -> None:
    """Until the notice comes, however long that takes; then drain this node. Raises ClusterError."""
    with _alone() as alone:
        if not alone:
            tell("this node is watched already")
            return
        notice = _wait_for_notice(metadata, poll_s, tell)
        tell(f"EC2 will {notice.action} this machine at {notice.at:%Y-%m-%d %H:%M:%S} UTC")
        _drain(notice, poll_s, tell)


def ask(client: httpx.Client) -> SpotNotice | None:
    """The notice, if there is one. Raises httpx.HTTPError where the metadata service does not answer as it should."""
    # A session of its own for each question: it costs nothing, and none can expire.
    token = client.put(TOKEN_PATH, headers=TOKEN_TTL)
    token.raise_for_status()
    answer = client.get(NOTICE_PATH, headers={TOKEN_HEADER: token.text})
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    answer.raise_for_status()
    return read_notice(answer.text, datetime.now(UTC))


def _wait_for_notice(metadata: str, poll_s: float, tell: Tell) -> SpotNotice:
    troubled = False
    # Not through the proxy of the environment: the service is this machine's own.
    with httpx.Client(base_url=metadata, timeout=_ANSWER_S, trust_env=False) as client:
        tell(f"watching {metadata}{NOTICE_PATH}")
        while True:
            try:
                notice = ask(client)
                troubled = False
            except httpx.HTTPError as problem:
                notice = None
                if not troubled:
                    tell(f"the metadata service does not answer: {type(problem).__name__}; trying on")
                troubled = True
            if notice is not None:
                return notice
            time.sleep(poll_s)


def _drain(notice: SpotNotice, poll_s: float, tell: Tell) -> None:
    """Ask Ray until it agrees, or until the machine would be gone."""
    while True:
        left = seconds_left(notice, datetime.now(UTC))
        problem = _try_to_drain(notice, left)
        if problem is None:
            tell(f"Ray drains this node, {left} s before its end")
            return
        tell(f"Ray does not drain this node: {problem}")
        if left == 0:
            raise ClusterError(f"this node could not be drained: {problem}; is Ray running on it?")
        time.sleep(poll_s)


def _try_to_drain(notice: SpotNotice, left_s: int) -> str | None:
    """What was in the way; None: it is drained."""
    import ray

    from farspan.jobs.launch import joined_ray

    try:
        with joined_ray():
            context = ray.get_runtime_context()
            node, head = context.get_node_id(), context.gcs_address
    except (ClusterError, RuntimeError) as problem:
        return str(problem)
    reason = f"EC2 will {notice.action} it at {notice.at.isoformat()}"
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", head, "--node-id", node,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason,
        "--deadline-remaining-seconds", str(left_s),
    ]  # fmt: skip
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DRAIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"ray drain-node did not end within {_DRAIN_S:g} s"
    said = (answer.stdout + answer.stderr).strip().splitlines()
    return None if answer.returncode == 0 else (said[-1] if said else f"it ended with {answer.returncode}")


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other process of this user watches; the setup of a node may be run again."""
    folder = Path.home() / ".cache" / "farspan"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "spot.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
