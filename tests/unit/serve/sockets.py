"""Requests as bytes, and what they hold meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

from tests.unit.serve.in_process import Served, idle

LONG = {"model": "tiny", "prompt": "x" * 200, "max_tokens": 7000, "temperature": 0, "ignore_eos": True}


def request_bytes(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-one\r\nContent-Length: {len(content)}"
    return f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + content


def busy(served: Served) -> bool:
    infos = asyncio.run(served.workers.info())
    return not all(idle(info) for info in infos)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
