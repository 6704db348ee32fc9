"""Nodes on this machine: the record names processes, not numbers, and nothing that is somebody else's is ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.cli import here
from farspan.cli.here import Here, Process, down, nodes_here, up
from farspan.config.cluster import HereConfig
from farspan.errors import ClusterError


def record(folder: Path, *nodes: Process) -> Here:
    kept = Here(folder, "", {"workers": 1}, list(nodes))
    kept.write()
    return kept


def test_a_number_that_belongs_to_another_process_by_now_is_not_ended(tmp_path: Path) -> None:
    began = here._began(os.getpid())
    assert began is not None
    record(tmp_path, Process("head", os.getpid(), began - 1))
    assert [node.status for node in nodes_here(tmp_path)] == ["ended"]
    assert down(tmp_path) == 0
    assert nodes_here(tmp_path) == []


def test_nodes_are_ended_and_one_that_ended_by_itself_is_noticed(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = [subprocess.Popen(sleeper, start_new_session=True) for _ in range(2)]
    record(tmp_path, *(Process("worker", p.pid, here._began(p.pid) or 0) for p in started))
    started[0].kill()
    started[0].wait(30)
    assert [node.status for node in nodes_here(tmp_path)] == ["ended", "runs"]
    with pytest.raises(ClusterError, match="1 of 2 nodes of another start still run here: run farspan cluster down"):
        up(HereConfig(), tmp_path, 1.0, print)
    assert down(tmp_path) == 1
    assert started[1].wait(30) == -15


def test_what_a_node_began_ends_with_it_also_where_it_would_not_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_END_S", 2.0)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
    node = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert node.stdout is not None
    left = int(node.stdout.readline())
    began = here._began(left)
    assert began is not None
    record(tmp_path, Process("worker", node.pid, here._began(node.pid) or 0))
    assert down(tmp_path) == 1
    assert here._began(left) != began
    assert node.wait(30) == -15
    node.stdout.close()


def test_a_zombie_is_not_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert here._began(process.pid) is None
    process.wait(30)


def test_the_python_of_this_command_is_the_first_its_nodes_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    environment = here._environment()
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_ADDRESS" not in environment
