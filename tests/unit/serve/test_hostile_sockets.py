"""Clients that break the rules of a socket: slow, torn, half closed, not text. They are refused, or let go at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from tests.unit.serve.in_process import Served
from tests.unit.serve.sockets import LONG, busy, request_bytes, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-one\r\n"
QUICK = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def client(port) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as made:
        yield made


def read_all(client: socket.socket) -> bytes:
    """Until the server closes; a server that never does fails the test by the socket's timeout."""
    found = b""
    try:
        while piece := client.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def answers(port: int) -> bool:
    """Whether others are served."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as other:
        other.sendall(request_bytes(QUICK).replace(b"Host: x", b"Host: x\r\nConnection: close"))
        return read_all(other).startswith(b"HTTP/1.1 200")


def test_a_body_that_comes_byte_by_byte_is_refused_in_time(served: Served, port, client, monkeypatch):
    monkeypatch.setattr(served.config, "body_timeout_s", 0.5)
    client.sendall(HEAD + b"Connection: close\r\nContent-Length: 1000\r\n\r\n{")
    began = time.monotonic()
    client.settimeout(0.05)
    told = b""
    while not told:
        assert time.monotonic() - began < 20
        client.sendall(b" ")
        try:
            told = client.recv(65536)
        except TimeoutError:
            continue
    assert told.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in told
    assert served.workers.asked == []


def test_a_head_that_never_ends_holds_nobody_back(served: Served, port):
    slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(50)]
    try:
        for number, one in enumerate(slow):
            one.sendall(HEAD[: 5 + number])
        assert answers(port)
    finally:
        for one in slow:
            one.close()
    assert answers(port)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_says_no_more_and_goes_frees_what_it_holds(served: Served, client, stream):
    client.sendall(request_bytes({**LONG, "stream": stream}))
    wait_until(lambda: busy(served))
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: not busy(served))


def test_a_client_that_resets_its_connection_in_the_middle_of_a_body_is_forgotten(served: Served, port, client):
    client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    assert answers(port)
    assert len({request.request_id for request in served.workers.asked}) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xfe\xfd\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        HEAD + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_the_connection_closed(served: Served, port, client, sent):
    try:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
    except OSError:
        # It did not even listen to the end.
        pass
    told = read_all(client)
    assert told == b"" or told.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 408")), told[:80]
    assert answers(port)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/requests/%ff%fe/trace HTTP/1.1\r\n", b"404"),
        (b"GET /v1/requests/%00/trace HTTP/1.1\r\n", b"404"),
        (b"GET /%c3%28 HTTP/1.1\r\n", b"404"),
        (b"GET /v1/models?x=%ff HTTP/1.1\r\nX-Request-Id: \xff\xfe\r\n", b"200"),
    ],
)
def test_bytes_that_are_no_text_are_never_our_fault(served: Served, client, head, status):
    client.sendall(head + b"Host: x\r\nAuthorization: Bearer sk-one\r\nConnection: close\r\n\r\n")
    assert read_all(client).split(b" ")[1] == status


def test_a_body_that_is_torn_inside_a_character_is_refused(served: Served, client):
    content = json.dumps({**QUICK, "prompt": "K\u00f6ln"}, ensure_ascii=False).encode().replace(b"\xb6", b"")
    client.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    told = read_all(client)
    assert told.startswith(b"HTTP/1.1 400")
    assert b"not JSON in UTF-8" in told


def test_requests_sent_one_behind_the_other_are_answered_in_their_order(served: Served, client):
    client.sendall(request_bytes(QUICK) * 3 + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    told = read_all(client)
    assert told.count(b"HTTP/1.1 200") == 4
    assert told.endswith(b'{"status":"ok"}')
