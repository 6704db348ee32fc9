"""The ingress listens itself, without Serve's proxy between it and its clients: each request and each piece of an
answer then crosses one process less.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
from typing import Any, cast

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farspan.errors import ClusterError
from farspan.serve.connection import Connection
from farspan.serve.faults import crowded
from farspan.serve.port import listening_socket
from farspan.serve.trace import request_name

KEEP_ALIVE_S = 75
"""How long a connection may say nothing after an answer."""
_ID_HEADER = "x-request-id"
CLOSING_S = 3.0
"""What `Listener.close` may take beyond the answers it waits for."""


class Listener:
    """Answers HTTP on a port of this machine, beside others of the same user: in an update the new ingress listens
    before the old one ends.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, most_open: int, head_timeout_s: float, drain_s: float
    ) -> None:
        """`most_open`: requests for something to be computed at a time, further ones are refused with status 503;
        `head_timeout_s`: for all that comes before a body, and for the next byte of an answer to be taken; `drain_s`:
        how long answers may take that are not whole at the end.
        """
        self._host, self._port = host, port
        self._serving: asyncio.Task[None] | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                Front(app, most_open),
                http=cast(Any, functools.partial(Connection, head_timeout_s=head_timeout_s)),
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
    """What Serve's proxy does before the application: each request has a name, and those that want something computed
    are not more than so many. Whoever asks how the endpoint is is always answered.
    """

    def __init__(self, app: ASGIApp, most_open: int) -> None:
        self._app, self._most_open, self._num_open = app, most_open, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _named(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(_ID_HEADER, name)
            await send(message)

        if scope["method"] != "POST":
            return await self._app(scope, receive, tell)
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
    name = request_name(given.decode("latin-1"))
    others = [pair for pair in scope["headers"] if pair[0] != _ID_HEADER.encode()]
    scope["headers"] = [*others, (_ID_HEADER.encode(), name.encode())]
    return name
