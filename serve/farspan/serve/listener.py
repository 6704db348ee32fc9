"""The ingress listens itself, without Serve's proxy between it and its clients: each request and each piece of an
answer then crosses one process less.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import re
import uuid
from asyncio import TimerHandle
from typing import cast

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from farspan.errors import ClusterError
from farspan.serve.faults import crowded
from farspan.serve.port import listening_socket

KEEP_ALIVE_S = 75
"""How long a connection may say nothing after an answer."""
_PLAIN_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_ID_HEADER = "x-request-id"
# Of a head, or of what comes behind the last piece of a body.
_MOST_LOOSE_BYTES = 65536
# A connection that is used sees its end coming; one that is not may be cut off.
_LEAVING_S = 1.0


class Listener:
    """Answers HTTP on a port of this machine, beside others of the same user: in an update the new ingress listens
    before the old one ends.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, most_open: int, head_timeout_s: float, drain_s: float
    ) -> None:
        """`most_open`: requests at a time, further ones are refused with status 503; `head_timeout_s`: for all that
        comes before a body; `drain_s`: how long answers may take that are not whole at the end.
        """
        self._host, self._port = host, port
        self._serving: asyncio.Task[None] | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                Front(app, most_open),
                http=_protocol(head_timeout_s),
                ws="none",
                loop="none",
                lifespan="off",
                # Headers of whoever asks say nothing about who asks.
                proxy_headers=False,
                access_log=False,
                log_config=None,
                # What strangers send fills no log; an answer that breaks off is told.
                log_level="error",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain_s),
            )
        )

    def start(self) -> None:
        """Listen, on the loop that runs; where it does, see that it still does.

        Raises:
            ConfigError: nobody may listen there.
            ClusterError: it listens no more.
        """
        if self._serving is None:
            sock = listening_socket(self._host, self._port)
            # Nothing of whoever starts it belongs to those who ask.
            self._serving = asyncio.get_running_loop().create_task(
                self._server.serve(sockets=[sock]), context=contextvars.Context()
            )
        elif self._serving.done():
            problem = None if self._serving.cancelled() else self._serving.exception()
            raise ClusterError(f"nobody listens on port {self._port} any more: {problem or 'it was ended'}")

    async def close(self) -> None:
        """Take no more connections, end those that wait for nothing, and wait for answers that are on their way."""
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait((self._serving,))


class Front:
    """What Serve's proxy does before the application: each request has a name, and they are not more than so many."""

    def __init__(self, app: ASGIApp, most_open: int) -> None:
        self._app, self._most_open, self._num_open = app, most_open, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _named(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(_ID_HEADER, name)
            await send(message)

        if self._num_open >= self._most_open:
            refusal = crowded(self._most_open)
            answer = JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)
            return await answer(scope, receive, tell)
        self._num_open += 1
        try:
            await self._app(scope, receive, tell)
        finally:
            self._num_open -= 1


def _named(scope: Scope) -> str:
    """The name a client gave a request, or else one that its application finds as if it had."""
    given = next((value for header, value in scope["headers"] if header == _ID_HEADER.encode()), b"")
    if _PLAIN_ID.fullmatch(given):
        return str(given, "ascii")
    name = uuid.uuid4().hex
    others = [pair for pair in scope["headers"] if pair[0] != _ID_HEADER.encode()]
    scope["headers"] = [*others, (_ID_HEADER.encode(), name.encode())]
    return name


def _protocol(head_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's, which has no clock for whoever connects and does not ask, or asks and does not read, and no limit for
    what is neither a body nor a whole head.
    """

    class Punctual(HttpToolsProtocol):
        _clock: TimerHandle | None = None
        _reader_clock: TimerHandle | None = None
        _num_loose = 0
        _is_leaving = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            # uvloop's are none by their class.
            super().connection_made(cast(asyncio.Transport, transport))
            self._await_head()

        def data_received(self, data: bytes) -> None:
            self._num_loose += len(data)
            super().data_received(data)
            if self._num_loose > _MOST_LOOSE_BYTES and not self.transport.is_closing():
                self._refuse_head()
            self._await_head()

        def on_headers_complete(self) -> None:
            self._num_loose = 0
            self._stop_clock()
            # Of an upgrade its parser takes what follows for the next request, and not for a body.
            is_last = self._is_leaving or self.parser.should_upgrade()
            if is_last:
                self.headers.append((b"connection", b"close"))
            super().on_headers_complete()
            if is_last:
                self.cycle.keep_alive = False

        def shutdown(self) -> None:
            # A request may be on its way: whoever asks now hears that it was the last time.
            if self._is_answering():
                super().shutdown()
            elif not self._is_leaving:
                self._is_leaving = True
                self.loop.call_later(_LEAVING_S, self.shutdown)
            else:
                self.transport.close()

        def on_body(self, body: bytes) -> None:
            self._num_loose = 0
            super().on_body(body)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            self._stop_reader_clock()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._stop_reader_clock()
            super().resume_writing()

        def _await_head(self) -> None:
            # Bytes that are no head do not lengthen it: the clock of a kept connection ends with the first one.
            if self._clock is None and not self._is_answering() and not self.transport.is_closing():
                self._clock = self.loop.call_later(head_timeout_s, self.transport.abort)

        def _stop_clock(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _refuse_head(self) -> None:
            if self._is_answering():
                self.transport.close()
            else:
                self.send_400_response(f"The head of a request must not have more than {_MOST_LOOSE_BYTES} bytes.")

        def _await_reader(self, num_unsent: int) -> None:
            self._reader_clock = self.loop.call_later(head_timeout_s, self._see_reader, num_unsent)

        def _stop_reader_clock(self) -> None:
            if self._reader_clock is not None:
                self._reader_clock.cancel()
                self._reader_clock = None

        def _see_reader(self, before: int) -> None:
            if (num_unsent := self.transport.get_write_buffer_size()) < before:
                self._await_reader(num_unsent)
            else:
                self.transport.abort()

    return Punctual
