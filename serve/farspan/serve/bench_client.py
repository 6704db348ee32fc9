"""A client of `farspan bench serve` that costs next to nothing: a socket, and times of events.

It shares the machine with what it measures; a comfortable client would take a part of what it tells.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from farspan.errors import ClusterError


@dataclass(slots=True)
class Streamed:
    """One streamed answer."""

    asked_s: float
    at_s: list[float] = field(default_factory=list)
    """When each event with text came."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    """Of the answer, where the client keeps them."""

    @property
    def first_s(self) -> float:
        """From asking to the first event."""
        return self.at_s[0] - self.asked_s

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between events that came inside a window."""
        inside = [at for at in self.at_s if begin_s <= at <= end_s]
        return [later - earlier for earlier, later in itertools.pairwise(inside)]


@dataclass(frozen=True, slots=True)
class BenchClient:
    """Asks one endpoint."""

    url: str
    model: str
    key: str
    deadline_s: float
    keep_tokens: bool = False
    """Costs a look into every event."""

    async def stream(self, prompt: Sequence[int], new_tokens: int) -> Streamed:
        """Raises ClusterError when the answer is not whole, or not there before the deadline."""
        request, found = self._request(prompt, new_tokens), Streamed(time.perf_counter())
        try:
            async with asyncio.timeout(self.deadline_s):
                await self._stream(request, found)
        except (TimeoutError, OSError, ValueError, EOFError) as problem:
            raise ClusterError(f"an answer over HTTP broke off: {type(problem).__name__} {problem}") from None
        if found.completion_tokens != new_tokens:
            raise ClusterError(f"an answer over HTTP has {found.completion_tokens} tokens, {new_tokens} were asked for")
        return found

    async def watch(self, prompt: Sequence[int], new_tokens: int, found: Streamed) -> None:
        """Note into `found` while the answer comes; whoever watches ends it when he has seen enough."""
        await self._stream(self._request(prompt, new_tokens), found)

    async def _stream(self, request: bytes, found: Streamed) -> None:
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "the address of a running endpoint"
        assert parts.port is not None, "the address of a running endpoint"
        loop = asyncio.get_running_loop()
        transport, events = await loop.create_connection(lambda: _Events(request, found), parts.hostname, parts.port)
        try:
            await events.over
        finally:
            transport.close()

    def _request(self, prompt: Sequence[int], new_tokens: int) -> bytes:
        body: dict[str, Any] = {"model": self.model, "prompt": list(prompt), "max_tokens": new_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        if self.keep_tokens:
            body["return_token_ids"] = True
        content = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: bench",
            f"Authorization: Bearer {self.key}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + content


class _Events(asyncio.Protocol):
    """One connection: a request, and the events that answer it, looked at where they arrive: no task is woken for
    them.
    """

    def __init__(self, request: bytes, found: Streamed) -> None:
        self._request, self._found = request, found
        self._begun, self._rest = False, b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the whole answer is there. Raises ValueError for another one, EOFError where it is cut off."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in lines:
                if self.over.done():
                    return
                self._take(line)
        except ValueError as problem:
            self.over.set_exception(problem)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or EOFError("no end"))

    def _take(self, line: bytes) -> None:
        if not self._begun:
            if b" 200 " not in line:
                raise ValueError(line.decode("latin-1").strip())
            self._begun = True
        elif line == b"data: [DONE]":
            self.over.set_result(None)
        elif line.startswith(b"data: "):
            _note(self._found, line)


def _note(found: Streamed, line: bytes) -> None:
    # The event that counts comes last and has no choices; the others are not even parsed, but for tokens asked for.
    if b'"choices":[]' in line:
        usage = json.loads(line[6:])["usage"]
        found.completion_tokens = usage["completion_tokens"]
        found.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    elif b'"error":' in line[:16]:
        raise ValueError(line[6:200].decode("utf-8", "replace"))
    else:
        found.at_s.append(time.perf_counter())
        if b'"token_ids":' in line:
            found.tokens += json.loads(line[6:])["choices"][0]["token_ids"]
