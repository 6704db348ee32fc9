"""`farspan cluster --on here`: several nodes of Ray on this machine, as processes of the user, on loopback, with token.

What runs is written in one record, so that `down` ends these processes and no others.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from farspan.cli.launch import Node
from farspan.cluster.diagnose import cannot_write, diagnose
from farspan.cluster.environment import AUTH, HABITS
from farspan.cluster.preflight import check_space
from farspan.config.cluster import HereConfig
from farspan.errors import ClusterError, ConfigError, StorageError

_LOOPBACK = "127.0.0.1"
_STARTED = "Ray runtime started"
_POLL_S = 0.1
_END_S = 20.0


@dataclass(frozen=True, slots=True)
class Process:
    """A node: `ray start`, which holds all of it; or what it began. A number alone may be somebody else's later."""

    kind: str
    pid: int
    began: int
    """When, in ticks of the kernel since the machine started."""

    def runs(self) -> bool:
        return _began(self.pid) == self.began


@dataclass
class Here:
    """What was started on this machine; `folder` is ours alone."""

    folder: Path
    temp: str = ""
    """Where Ray keeps its sockets and logs."""
    settings: dict[str, Any] = field(default_factory=dict)
    nodes: list[Process] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "nodes.json"

    def read(self) -> Here:
        """The record, if there is one. Raises StorageError where it is none of ours."""
        if not self.file.is_file():
            return self
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.temp, self.settings = kept["temp"], kept["settings"]
            self.nodes = [Process(**node) for node in kept["nodes"]]
        except (ValueError, KeyError, TypeError):
            reason = "is not the record of nodes that it should be; end what runs of Ray (ray stop), then delete it"
            raise StorageError(str(self.file), reason) from None
        return self

    def write(self) -> None:
        kept = {"temp": self.temp, "settings": self.settings, "nodes": [asdict(node) for node in self.nodes]}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.file.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        except OSError as problem:
            raise StorageError(str(self.file), cannot_write(problem)) from None


def up(config: HereConfig, folder: Path, timeout_s: float, say: Callable[[str], None]) -> str:
    """Start head and workers, or find them running; gives the address of the dashboard.

    Raises ConfigError, StorageError, ClusterError; then nothing that was started here goes on.
    """
    here, address = Here(folder).read(), f"http://{_LOOPBACK}:{config.dashboard_port}"
    running = [node for node in here.nodes if node.runs()]
    if running and (len(running) < len(here.nodes) or here.settings != asdict(config)):
        raise ClusterError(
            f"{len(running)} of {len(here.nodes)} nodes of another start still run here: run farspan cluster down "
            "--on here first"
        )
    if running:
        return address
    down(folder)
    check_space(folder)
    for name in ("port", "dashboard_port"):
        _refuse_taken(f"here.{name}", getattr(config, name))
    here = Here(folder, tempfile.mkdtemp(prefix="farspan-"), asdict(config))
    here.write()
    ends = time.monotonic() + timeout_s
    try:
        for kind, words in _starts(config, here.temp):
            say(f"starting {kind}")
            _start(here, kind, words, ends)
    except BaseException:
        down(folder)
        raise
    return address


def down(folder: Path) -> int:
    """End every node that still runs, workers first; gives how many. Raises ClusterError where one does not end."""
    here = Here(folder).read()
    running = [node for node in reversed(here.nodes) if node.runs()]
    # Workers end by themselves when they miss their node; whoever asks for the end of a cluster waits for theirs, too.
    begun = _begun_by(running)
    for way in (signal.SIGTERM, signal.SIGKILL):
        for node in running:
            if node.runs():
                with suppress(ProcessLookupError):
                    # What `ray start --block` began ends with it; killed, it could not see to that itself.
                    (os.kill if way == signal.SIGTERM else os.killpg)(node.pid, way)
        _wait_for_end(running)
    for process in _wait_for_end(begun):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    if left := _wait_for_end([*running, *begun]):
        raise ClusterError(f"process {left[0].pid} of Ray does not end; end it yourself: kill -9 {left[0].pid}")
    if here.temp:
        shutil.rmtree(here.temp, ignore_errors=True)
    if here.file.is_file():
        here.file.unlink()
    return len(running)


def _begun_by(nodes: Sequence[Process]) -> list[Process]:
    """Every process that these began, and those that they began."""
    begun: list[Process] = []
    for node in nodes:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(node.pid).children(recursive=True):
                if (began := _began(child.pid)) is not None:
                    begun.append(Process(node.kind, child.pid, began))
    return begun


def _wait_for_end(processes: Sequence[Process]) -> list[Process]:
    """Who still runs after a while."""
    ends = time.monotonic() + _END_S
    while (left := [process for process in processes if process.runs()]) and time.monotonic() < ends:
        time.sleep(_POLL_S)
    return left


def nodes_here(folder: Path) -> list[Node]:
    """The nodes of the record."""
    nodes = Here(folder).read().nodes
    return [Node(str(node.pid), node.kind, _LOOPBACK, "runs" if node.runs() else "ended") for node in nodes]


def _starts(config: HereConfig, temp: str) -> list[tuple[str, list[str]]]:
    """Kind and words of each `ray start`, in their order."""
    store = f"--object-store-memory={config.object_store_mib << 20}"
    head = [
        "--head", f"--port={config.port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={config.dashboard_port}", f"--temp-dir={temp}", store, "--labels=farspan-role=head",
    ]  # fmt: skip
    worker = [f"--address={_LOOPBACK}:{config.port}", f"--num-cpus={config.cpus}", store, "--labels=farspan-role=cpu"]
    return [("head", head), *(("worker", worker) for _ in range(config.workers))]


def _start(here: Here, kind: str, words: list[str], ends: float) -> None:
    """One node, until it says that it runs."""
    log = here.folder / f"node{len(here.nodes)}.log"
    # Several nodes share this machine's ports: all but those that are named are whichever are free.
    free = ["--dashboard-agent-listen-port=0", "--metrics-export-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    common = [f"--node-ip-address={_LOOPBACK}", "--disable-usage-stats", "--block", *free]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *common],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
    here.nodes.append(Process(kind, process.pid, _began(process.pid) or 0))
    here.write()
    while _STARTED not in (said := log.read_text(encoding="utf-8", errors="replace")):
        if process.poll() is not None:
            raise ClusterError(f"the {kind} did not start: {diagnose(said)} (log: {log})")
        if time.monotonic() > ends:
            raise ClusterError(f"the {kind} did not start in time: {diagnose(said)} (log: {log})")
        time.sleep(_POLL_S)


def _environment() -> dict[str, str]:
    """Ours, with the token, and with this Python before any other."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**HABITS, **kept, **AUTH, "PATH": path}


def _refuse_taken(name: str, port: int) -> None:
    with socket.socket() as probe:
        # A port whose last user has gone is free, though its connections still fade.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
            probe.listen(1)
        except OSError:
            way_out = f"stop what listens there, or use {name}={port + 1}"
            raise ConfigError(name, "must be a free port of this machine", port, way_out) from None


def _began(pid: int) -> int | None:
    """When a process began; None: there is none, or only its exit code is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # After the name, which may hold anything: state first, the begin as field 22 of the whole.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(rest[18])
