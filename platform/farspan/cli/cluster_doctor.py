"""`farspan doctor --cluster`: look at this machine, and at what it must reach."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from farspan.cli.cluster import load_spec
from farspan.cluster.examine import FAIL, OK, Finding, Gpu, MachineFacts, Reach, examine_machine
from farspan.cluster.preflight import GCS_PORT
from farspan.errors import ConfigError

PORTS = {GCS_PORT: "its head", 8265: "the dashboard", 8076: "objects", 8000: "requests"}
_REACH_S = 3.0
_ASK_S = 20.0
_LEAST_WIDTH = 130
# Of adjtimex(2): the kernel's clock is not steered by anybody.
_UNSYNCHRONIZED = 0x40
_TIMEX_BYTES = 512
_STATUS_OFFSET = 40


def run_cluster_doctor(nodes: list[str], *, as_json: bool) -> None:
    """Examine this machine and print; exits with 1 when a check failed."""
    found = examine_machine(gather(nodes), load_spec(None, None).software)
    failed = any(finding.verdict == FAIL for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        _print(found)
    if failed:
        raise typer.Exit(1)


def gather(nodes: list[str]) -> MachineFacts:
    """Everything that can be seen of this machine in a few seconds."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    token = _token_file()
    gpus = _gpus()
    return MachineFacts(
        versions={name: _version(name) for name in ("farspan", "ray", "torch", "transformers", "nixl")},
        taken_ports={port: use for port, use in PORTS.items() if _is_taken(port)},
        shared_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_path=tempfile.gettempdir(),
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        token_mode=stat.S_IMODE(token.stat().st_mode) if token.is_file() else None,
        token_bytes=token.stat().st_size if token.is_file() else 0,
        auth_mode=os.environ.get("RAY_AUTH_MODE"),
        clock_synchronized=_is_synchronized(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        own_address=_own_address(),
        reaches=tuple(_reach(node) for node in nodes),
        gpus=gpus,
        nccl=_nccl() if gpus else None,
    )


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        # A port whose last user has gone is free, though its connections still fade.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return True
    return False


def _is_synchronized() -> bool | None:
    """What the kernel says of its clock; None where it may not be asked."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    status = ctypes.c_int.from_buffer(timex, _STATUS_OFFSET).value
    return not status & _UNSYNCHRONIZED


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _reach(node: str) -> Reach:
    host, _, port = node.partition(":")
    if not host or (port and not port.isdigit()):
        raise ConfigError("--node", "must be HOST or HOST:PORT", node, "use --node 10.0.0.4:6379")
    number = int(port or GCS_PORT)
    if number == GCS_PORT:
        from farspan.jobs.knock import knock

        closed = knock(host, number)
        return Reach(node, None) if closed is None else Reach(node, closed.problem, closed.way_out)
    try:
        with socket.create_connection((host, number), timeout=_REACH_S):
            return Reach(node, None)
    except OSError as problem:
        return Reach(node, problem.strerror or str(problem) or type(problem).__name__)


def _gpus() -> tuple[Gpu, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return ()
    rows = [line.split(", ") for line in answer.stdout.splitlines() if ", " in line]
    return tuple(Gpu(name, driver) for name, driver in rows)


def _nccl() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _print(found: list[Finding]) -> None:
    terminal = Console(highlight=False)
    console = Console(highlight=False, width=max(_LEAST_WIDTH, terminal.width))
    table = Table("", "check", "found", "what to do", box=None)
    for finding in found:
        style = {OK: "green", FAIL: "bold red"}.get(finding.verdict, "yellow")
        table.add_row(f"[{style}]{finding.verdict}[/{style}]", finding.check, finding.found, finding.fix)
    console.print(table)
    counts = {verdict: sum(f.verdict == verdict for f in found) for verdict in (OK, "WARN", FAIL)}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
