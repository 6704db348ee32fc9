"""`farspan serve` ends with Ctrl-C or SIGTERM and leaves no process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tests.unit.serve.tiny_folder import write_tiny_model


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_server_ends_when_told_and_leaves_no_process(tmp_path, how):
    write_tiny_model(tmp_path / "tiny")
    key_file = tmp_path / "keys"
    key_file.touch(mode=0o600)
    key_file.write_text("sk-test\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"model={tmp_path / 'tiny'}", f"port={port}", f"api_key_file={key_file}", "engine.kv_bytes=4194304"]
    server = subprocess.Popen(
        [sys.executable, "-m", "farspan.cli.main", "serve", "serve/configs/local.yaml", *settings],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("ready: "))
        _, url, _, model, *_ = line.split()
        answer = httpx.post(
            f"{url}/completions",
            json={"model": model, "prompt": "import", "max_tokens": 4, "temperature": 0},
            headers={"Authorization": "Bearer sk-test"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        started = descendants(server.pid)
        assert len(started) > 4
        # As a terminal does: Ctrl-C reaches every process of the foreground group.
        os.killpg(server.pid, how) if how == signal.SIGINT else server.send_signal(how)
        server.wait(timeout=90)
        deadline = time.monotonic() + 30
        while alive := [pid for pid in started if is_alive(pid)]:
            assert time.monotonic() < deadline, f"left behind: {alive}"
            time.sleep(0.1)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait(timeout=30)


def descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
