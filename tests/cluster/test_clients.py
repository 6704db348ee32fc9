"""Other people's clients against a real server: Ray's own benchmark, and ten thousand that ask nothing."""

from __future__ import annotations

import json
import re
import resource
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.schema import EngineConfig, ServeConfig
from farspan.serve.app import Running, run_app
from farspan.serve.port import free_port

IDLE = 10_000
# Of the server, for each: what a protocol object, a transport and the parts of a head need, twice over.
BYTES_EACH = 48 * 1024
BODY_TIMEOUT_S = 2.0
# File descriptors of the two processes beside the connections.
OTHERS = 512


pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("clients")
    write_tiny_model(made / "tiny")
    return made


@pytest.fixture(scope="module", params=["proxy", "ingress"])
def running(request, ray_cluster, folder) -> Iterator[Running]:
    key_file = folder / "keys"
    key_file.touch(mode=0o600)
    key_file.write_text("sk-client\n")
    config = ServeConfig(
        model=str(folder / "tiny"),
        port=free_port(),
        listener=request.param,
        api_key_file=str(key_file),
        engine=EngineConfig(kv_bytes=8 * 1024 * 1024),
        body_timeout_s=BODY_TIMEOUT_S,
        start_timeout_s=120,
    )
    with run_app(config) as made:
        yield made


def test_rays_own_benchmark_gets_every_token_it_counts(running, folder, tmp_path):
    before = counted(running)
    sessions, turns, answer_tokens = 12, 2, 8
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ray.llm._internal.serve.benchmark"),
            *("--base-url", running.url.removesuffix("/v1"), "--api-key", "sk-client"),
            *("--model", running.model, "--tokenizer", str(folder / "tiny")),
            *("--request-rate", "8", "--num-sessions", str(sessions), "--num-turns", str(turns)),
            *("--isl", "300", "--hit-rate", "0.5", "--osl", str(answer_tokens), "--seed", "1"),
            *("--save-result", str(tmp_path / "told.json")),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "told.json").read_text())["raw_metrics"]
    assert " failed: " not in done.stdout + done.stderr
    # It stops by the clock: a request more or less is its own.
    assert len(told) > sessions * turns / 2
    assert {one["turn"] for one in told} == set(range(turns))
    # The model may end earlier.
    assert max(one["output_tokens"] for one in told) == answer_tokens
    gained = {name: counted(running)[name] - before[name] for name in before}
    assert gained["answer"] == sum(one["output_tokens"] for one in told)
    assert gained["prompt"] == sum(one["input_tokens"] for one in told)
    # It sends much that it has sent before.
    assert gained["cached"] > 0.1 * gained["prompt"]


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-client\r\n"


def test_a_body_without_end_is_refused_and_not_kept(running):
    port = httpx.URL(running.url).port
    before = listener_bytes(port)
    chunk, sent, told = b"%x\r\n%s\r\n" % (65536, b"x" * 65536), 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        client.settimeout(0)
        while not told and sent < 2**30:
            told, more = told_or_sent(client, chunk[sent % len(chunk) :])
            sent += more
        grown = listener_bytes(port) - before
    assert told.startswith(b"HTTP/1.1 413"), told[:100]
    # A proxy reads on until it hears of the refusal.
    assert grown < 2**28, f"{grown} bytes more after {sent} bytes"


def told_or_sent(client: socket.socket, content: bytes) -> tuple[bytes, int]:
    """What the server says, or how much of `content` it took; waits for one of both."""
    readable, writable, _ = select.select([client], [client], [], 60)
    if readable:
        return client.recv(65536), 0
    assert writable, "the server does nothing any more"
    return b"", client.send(content)


def test_a_body_that_comes_byte_by_byte_is_refused_in_time(running):
    with socket.create_connection(("127.0.0.1", httpx.URL(running.url).port), timeout=0.1) as client:
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        began, told = time.monotonic(), b""
        while not told:
            assert time.monotonic() - began < 20 * BODY_TIMEOUT_S
            client.sendall(b" ")
            try:
                told = client.recv(65536)
            except TimeoutError:
                continue
    assert told.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began >= BODY_TIMEOUT_S


def counted(running: Running) -> dict[str, float]:
    """Tokens of all answered requests, as the endpoint counts them."""
    told = httpx.get(f"{running.url.removesuffix('/v1')}/metrics", headers={"Authorization": "Bearer sk-client"})
    found = dict.fromkeys(("prompt", "answer", "cached"), 0.0)
    return found | {
        kind: float(value)
        for kind, value in re.findall(r'^farspan_request_tokens_total\{kind="(\w+)"\} (\S+)$', told.text, re.MULTILINE)
    }


def seconds_of_requests(running: Running, count: int) -> list[float]:
    asked = {"model": running.model, "prompt": "import", "max_tokens": 4, "temperature": 0}
    found = []
    with httpx.Client(headers={"Authorization": "Bearer sk-client"}, timeout=60) as client:
        for _ in range(count):
            began = time.monotonic()
            answer = client.post(f"{running.url}/completions", json=asked)
            assert answer.status_code == 200, answer.text
            found.append(time.monotonic() - began)
    return found


def listener_bytes(port: int) -> int:
    """Resident memory of whoever listens."""
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == port
    }
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds(process, inodes):
            pages = int((process / "statm").read_text().split()[1])
            return pages * resource.getpagesize()
    raise AssertionError("nobody listens")


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        found = list((process / "fd").iterdir())
    except OSError:
        return False
    sockets = {f"socket:[{inode}]" for inode in inodes}
    return any(_link(descriptor) in sockets for descriptor in found)


def _link(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        # Closed meanwhile.
        return ""


def test_ten_thousand_idle_and_half_asked_connections_cost_bounded_memory_and_delay_nobody(running):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(IDLE, most - OTHERS)
    before_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    port = httpx.URL(running.url).port
    alone = seconds_of_requests(running, 30)[10:]
    before = listener_bytes(port)
    try:
        with ExitStack() as held:
            for number in range(count):
                one = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
                if number % 2:
                    one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            meanwhile = seconds_of_requests(running, 20)
            grown = listener_bytes(port) - before
        after = seconds_of_requests(running, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before_limit)
    print(f"{count} connections: {grown / 2**20:.0f} MiB more", end="; ")
    print(", ".join(f"{statistics.median(times) * 1e3:.0f} ms" for times in (alone, meanwhile, after)))
    assert count > 1000, "too few file descriptors are allowed here"
    assert grown < count * BYTES_EACH
    # Medians on a machine that others use too: what idle connections cost must not be of another order.
    assert statistics.median(meanwhile) < 2 * statistics.median(alone) + 0.1
