"""An ingress that listens itself: what Serve's proxy would do for an application is done here."""

from __future__ import annotations

import asyncio
import contextvars
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from farspan.errors import ClusterError, ConfigError
from farspan.serve import connection
from farspan.serve.listener import Listener
from farspan.serve.port import free_port, listening_socket, refuse_taken_port

HOST = "127.0.0.1"
KNOWN: contextvars.ContextVar[str] = contextvars.ContextVar("known", default="nothing")


class Held:
    """An application that says what it was asked: when it was, at once, or (held) with an end that waits."""

    def __init__(self) -> None:
        self.let_go, self.begun = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while scope["path"] != "/early" and (message := await receive()):
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        name = next((str(value, "ascii") for key, value in scope["headers"] if key == b"x-request-id"), None)
        told = json.dumps({"name": name, "known": KNOWN.get(), "body": len(body)}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": told, "more_body": True})
        self.begun.set()
        if scope["path"] == "/held":
            await self.let_go.wait()
        await send({"type": "http.response.body", "body": b"\n"})


@asynccontextmanager
async def listening(
    app: ASGIApp, port: int, *, most_open: int = 10, head_timeout_s: float = 30.0, drain_s: float = 30.0
) -> AsyncIterator[Listener]:
    listener = Listener(app, HOST, port, most_open=most_open, head_timeout_s=head_timeout_s, drain_s=drain_s)
    listener.start()
    try:
        yield listener
    finally:
        await listener.close()


def client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=30)


@pytest.mark.parametrize("given", ["mine-1", None, "", "of two words", "x" * 65, "smuggled\\r"])
def test_each_request_has_a_name_that_application_and_client_know(given: str | None) -> None:
    async def ask() -> tuple[str, str]:
        port = free_port()
        async with listening(Held(), port), client(port) as one:
            answer = await one.get("/", headers={} if given is None else {"x-request-id": given})
            return answer.headers["x-request-id"], answer.json()["name"]

    told, found = asyncio.run(ask())
    assert told == found
    assert (told == given) == (given == "mine-1")
    assert told


def test_requests_beyond_the_most_are_refused_in_openais_shape_and_taken_again_later() -> None:
    async def ask() -> None:
        app, port = Held(), free_port()
        async with listening(app, port, most_open=1), client(port) as one:
            held = asyncio.ensure_future(one.post("/held"))
            await app.begun.wait()
            refused = await one.post("/")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["x-request-id"]
            assert refused.json()["error"]["code"] == "unavailable"
            # Whoever asks how the endpoint is is told.
            assert (await one.get("/")).status_code == 200
            app.let_go.set()
            assert (await held).status_code == 200
            assert (await one.post("/")).status_code == 200

    asyncio.run(ask())


_HALF = b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: "


# Whoever says nothing after an answer may: that is the wait of a kept connection.
@pytest.mark.parametrize(("sent", "after_an_answer"), [(b"", False), (_HALF, False), (_HALF, True)])
def test_whoever_does_not_end_the_head_of_a_request_is_let_go(sent: bytes, after_an_answer: bool) -> None:
    async def ask() -> float:
        port, loop = free_port(), asyncio.get_running_loop()
        async with listening(Held(), port, head_timeout_s=1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            if after_an_answer:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            began = loop.time()
            writer.write(sent)
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()
            return loop.time() - began

    assert asyncio.run(ask()) > 0.9


# What is no head stops the clock of a kept connection: it must not stop every clock.
@pytest.mark.parametrize(
    ("asked", "then"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
        (b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"x"),
    ],
)
def test_whoever_sends_what_is_no_head_after_an_answer_is_let_go(asked: bytes, then: bytes) -> None:
    async def ask() -> None:
        port = free_port()
        async with listening(Held(), port, head_timeout_s=1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(asked)
            await reader.readuntil(b"0\r\n\r\n")
            writer.write(then)
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(ask())


def test_the_beginning_of_a_next_request_does_not_cut_off_an_answer() -> None:
    async def ask() -> None:
        app, port = Held(), free_port()
        async with listening(app, port, head_timeout_s=1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
            await app.begun.wait()
            writer.write(b"GET / HT")
            await asyncio.sleep(1.3)
            app.let_go.set()
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("begin", "answered"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", False),
        (b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", True),
    ],
)
def test_a_head_or_trailers_without_end_are_not_kept(begin: bytes, answered: bool) -> None:
    async def ask() -> None:
        port, told = free_port(), b""
        async with listening(Held(), port):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(begin)
            if answered:
                await reader.readuntil(b"0\r\n\r\n")
            piece = b"x" * 999 if begin.endswith(b" ") else b"a: " + b"x" * 994 + b"\r\n"
            # Not one byte more than is refused: what nobody reads would take the refusal with it.
            for _ in range(66):
                writer.write(piece)
            async with asyncio.timeout(30):
                told = await reader.read()
            assert told.startswith(b"HTTP/1.1 400")
            writer.close()

    asyncio.run(ask())


def test_whoever_asks_and_does_not_read_holds_no_place_for_ever() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2 if scope["path"] == "/short" else 40):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
        await send({"type": "http.response.body"})

    async def ask() -> None:
        port = free_port()
        async with listening(large, port, most_open=1, head_timeout_s=1.0), client(port) as one:
            with socket.create_connection((HOST, port)) as deaf:
                deaf.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                async with asyncio.timeout(30):
                    while (await one.post("/short")).status_code != 503:
                        pass
                    while (await one.post("/short")).status_code != 200:
                        await asyncio.sleep(0.05)

    asyncio.run(ask())


@pytest.mark.parametrize("num_behind", [0, 1, 2])
def test_a_client_that_leaves_is_noticed_by_the_request_that_runs_whatever_waits_behind_it(num_behind: int) -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async def ask() -> None:
        port = free_port()
        async with listening(patient, port):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * (1 + num_behind))
            await begun.wait()
            writer.transport.abort()
            await asyncio.wait_for(left.wait(), 30)

    asyncio.run(ask())


def test_what_follows_an_upgrade_is_no_request() -> None:
    async def ask() -> bytes:
        port = free_port()
        async with listening(Held(), port):
            reader, writer = await asyncio.open_connection(HOST, port)
            head = (
                b"POST /early HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 27\r\n\r\n"
            )
            writer.write(head)
            async with asyncio.timeout(30):
                told = await reader.readuntil(b"0\r\n\r\n")
                with suppress(ConnectionError):
                    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    told += await reader.read()
            writer.close()
            return told

    assert asyncio.run(ask()).count(b"HTTP/1.1 ") == 1


def test_a_body_and_an_answer_may_take_longer_than_a_head() -> None:
    async def ask() -> None:
        app, port = Held(), free_port()
        async with listening(app, port, head_timeout_s=1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
            await asyncio.sleep(1.2)
            writer.write(b"cd")
            await app.begun.wait()
            await asyncio.sleep(1.2)
            app.let_go.set()
            assert b'"body": 4' in await reader.readuntil(b"0\r\n\r\n")
            writer.close()

    asyncio.run(ask())


def test_at_its_end_answers_come_whole_and_nobody_else_gets_in() -> None:
    async def ask() -> None:
        app, port = Held(), free_port()
        async with listening(app, port) as listener, client(port) as one:
            idle = await asyncio.open_connection(HOST, port)
            held = asyncio.ensure_future(one.get("/held"))
            await app.begun.wait()
            closing = asyncio.ensure_future(listener.close())
            async with asyncio.timeout(30):
                assert await idle[0].read() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(HOST, port)
            assert not closing.done()
            app.let_go.set()
            assert (await held).text.endswith("\n")
            await asyncio.wait_for(closing, 30)
            with pytest.raises(ClusterError, match=f"listens on port {port} any more"):
                listener.start()
            idle[1].close()

    asyncio.run(ask())


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\n"])
def test_a_request_that_is_on_its_way_at_the_end_is_answered_as_the_last_one(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long this process is held up on its way.
    monkeypatch.setattr(connection, "_LEAVING_S", 60.0)

    async def ask() -> bytes:
        port = free_port()
        async with listening(Held(), port) as listener:
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"0\r\n\r\n")
            writer.write(before)
            closing = asyncio.ensure_future(listener.close())
            async with asyncio.timeout(30):
                while _is_open(port):
                    await asyncio.sleep(0.01)
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[len(before) :])
                told = await reader.read()
                await closing
            writer.close()
            return told

    told = asyncio.run(ask())
    assert told.startswith(b"HTTP/1.1 200")
    assert b"connection: close\r\n" in told
    assert told.endswith(b"0\r\n\r\n")


def _is_open(port: int) -> bool:
    try:
        socket.create_connection((HOST, port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_an_answer_that_takes_longer_than_the_end_may_is_cut_off() -> None:
    async def ask() -> None:
        app, port = Held(), free_port()
        async with listening(app, port, drain_s=1.0) as listener, client(port) as one:
            held = asyncio.ensure_future(one.get("/held"))
            await app.begun.wait()
            await asyncio.wait_for(listener.close(), 30)
            with pytest.raises(httpx.RemoteProtocolError):
                await held

    asyncio.run(ask())


def test_in_an_update_the_new_one_listens_beside_the_old_one() -> None:
    async def ask() -> None:
        old, new, port = Held(), Held(), free_port()
        async with listening(new, port):
            async with listening(old, port), client(port) as one:
                for _ in range(50):
                    assert (await one.get("/", headers={"connection": "close"})).status_code == 200
            new.begun.clear()
            async with client(port) as one:
                assert (await one.get("/")).status_code == 200
                assert new.begun.is_set()

    asyncio.run(ask())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_whoever_starts_it_knows_is_not_what_requests_know(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def ask() -> str:
        port = free_port()
        KNOWN.set("a secret")
        async with listening(Held(), port) as listener, client(port) as one:
            # Told again and again, as by Serve.
            listener.start()
            known: str = (await one.get("/")).json()["known"]
            return known

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(ask()) == "nothing"


def test_a_port_of_somebody_else_is_refused_and_one_that_is_shared_is_not_free() -> None:
    with socket.create_server((HOST, 0)) as other, pytest.raises(ConfigError, match="port: must be free"):
        listening_socket(HOST, other.getsockname()[1])
    with listening_socket(HOST, 0) as mine:
        port = mine.getsockname()[1]
        listening_socket(HOST, port).close()
        with pytest.raises(ConfigError, match="port: must be free"):
            refuse_taken_port(HOST, port)
    with pytest.raises(ConfigError, match="host: must be an address of this machine"):
        listening_socket("192.0.2.1", port)
