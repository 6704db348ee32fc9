"""Where Ray begins and ends: a local Ray for one command, or a running cluster.

A local Ray keeps Ray's token authentication, binds to this machine and is stopped when its block ends, also by an
exception or Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from farspan.cluster.environment import HABITS
from farspan.errors import ClusterError
from farspan.jobs.knock import knock

_AUTH_MODE = "RAY_AUTH_MODE"
_TOKEN_FILE = Path("~/.ray/auth_token")
# Of Ray, for a Ray of one command on one machine, whose processors are the command's.
_ALONE = {
    # Nobody takes this node away while it works.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A process that waits for a next task wakes a hundred times a second; by itself Ray keeps one for each processor.
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "20000",
    # New log files are looked for ten times a second otherwise, for drivers that show their workers' output.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "5",
    # How often the use of processors and memory is measured for Ray's metrics; 5000 by itself.
    "REPORTER_UPDATE_INTERVAL_MS": "10000",
}
# Of a node's session: where Ray unpacks what a job brought along.
_UNPACKED = "working_dir_files"


@contextmanager
def local_ray(num_cpus: float, num_gpus: float = 0.0) -> Iterator[None]:
    """A Ray of our own on this machine with at least `num_cpus` logical CPUs."""
    make_token()
    with ray_environment(_ALONE):
        cpus = max(os.cpu_count() or 1, -(-num_cpus // 1))
        try:
            _init(
                "local",
                num_cpus=int(cpus),
                num_gpus=int(num_gpus) or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def joined_ray() -> Iterator[None]:
    """The running Ray this process belongs to (a submitted job, or a driver on a node of the cluster).

    Raises:
        ClusterError: nobody answers, or this process is not let in.
    """
    # "auto" alone would take any Ray of this machine; a submitted job is told which one is its own.
    address = os.environ.get("RAY_ADDRESS", "auto")
    _refuse_closed(address)
    with ray_environment():
        try:
            _init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (ConnectionError, AuthenticationError) as problem:
            raise ClusterError(f"no Ray answers at {address}: {problem}; start one with `ray start --head`") from None
        try:
            yield
        finally:
            ray.shutdown()


def _init(address: str, **settings: Any) -> None:
    """`ray.init`, after which SIGTERM means what it meant before: Ray's core takes it, and ends the process at once."""
    meant = signal.getsignal(signal.SIGTERM)
    ray.init(address, **settings)
    # Only the main thread may say what a signal means, and only what Python said before.
    if meant is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, meant)


def _refuse_closed(address: str) -> None:
    host, _, port = address.rpartition(":")
    # `auto` and names of other kinds are Ray's to look up.
    if "://" in host or not host or not port.isdigit():
        return
    if (closed := knock(host.strip("[]"), int(port))) is not None:
        raise ClusterError(f"the cluster at {address} cannot be joined: {closed}")


@contextmanager
def ray_environment(more: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Ray's own environment switches, and `more` of them, for the length of a block; what the user set wins.

    Where there is a token it is used: without RAY_AUTH_MODE Ray's clients of a running cluster would not send it.
    """
    added = {name: value for name, value in {**HABITS, **more}.items() if name not in os.environ}
    if _AUTH_MODE not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        added[_AUTH_MODE] = "token"
    os.environ.update(added)
    if _AUTH_MODE in added:
        # Ray read the variable when it was imported.
        Config.initialize("")
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def is_passing(folder: Path) -> bool:
    """Whether a folder lies in what Ray unpacked for a job, which it removes some time after the job."""
    return _UNPACKED in folder.parts


def make_token() -> None:
    """Make Ray's authentication token where it looks for one, readable by its owner alone, if there is none.

    Ray would make it too, but readable by everyone on the machine.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = _TOKEN_FILE.expanduser()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
