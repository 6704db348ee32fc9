"""The same endpoint behind a real socket: clients that hang up, strangers, and OpenAI's own synchronous client."""

from __future__ import annotations

import socket
import time

import httpx
import openai
import pytest
from tests.unit.serve.in_process import Served
from tests.unit.serve.sockets import LONG, busy, request_bytes, wait_until


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_connection_that_is_closed_frees_everything_within_a_second(served: Served, port, stream, n):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(request_bytes({**LONG, "stream": stream, "n": n}))
        if stream:
            assert client.recv(20).startswith(b"HTTP/1.1 200")
        else:
            wait_until(lambda: busy(served))
    # Seconds of this process, the server in it: others on the machine do not make it late.
    began = time.process_time()
    wait_until(lambda: not busy(served))
    assert time.process_time() - began < 1.0


def test_a_client_that_reads_nothing_holds_nobody_else_back(served: Served, port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(request_bytes({**LONG, "stream": True, "logprobs": 20}))
        wait_until(lambda: busy(served))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-two", max_retries=0, timeout=60)
        with client:
            told = client.completions.create(model="tiny", prompt="y", max_tokens=20, extra_body={"ignore_eos": True})
        assert told.usage.completion_tokens == 20
    wait_until(lambda: not busy(served))


def test_openais_synchronous_client_streams_and_reads_errors(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-one", max_retries=0, timeout=60) as client:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        told = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert told == whole.choices[0].message.content
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert parts[-1].choices == []
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**{**asked, "temperature": 9})
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**asked, "model": "other"})
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-no", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize("authorization", [None, "Bearer sk-no", "Basic sk-one"])
def test_whoever_asks_the_ingress_without_serves_proxy_needs_a_key_all_the_same(
    served: Served, port: int, authorization: str | None
):
    # Of the application itself: an address that is added later is asked too.
    asked = {(method, path.path) for path in served.app.routes for method in path.methods}
    open_to_all = {("GET", "/health"), ("GET", "/ready"), ("GET", "/openapi.json")}
    assert open_to_all < asked
    headers = {} if authorization is None else {"authorization": authorization}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60, headers=headers) as client:
        told = {}
        for method, path in asked:
            address = path.replace(":path}", "}").format(request_id="x", model_id="x")
            told[method, path] = client.request(method, address, content=b"{}").status_code
        assert client.get("/v1/models", headers={"authorization": "Bearer sk-one"}).status_code == 200
    assert told == {address: 200 if address in open_to_all else 401 for address in asked}
    assert served.workers.asked == []


def test_a_body_that_is_lost_in_an_upgrade_is_told_as_such(served: Served, port: int):
    headers = {"authorization": "Bearer sk-one", "connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c"}
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    told = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, headers=headers, timeout=60)
    assert (told.status_code, told.json()["error"]["param"]) == (400, "upgrade")
    assert "without Upgrade" in told.json()["error"]["message"]
    assert served.workers.asked == []
