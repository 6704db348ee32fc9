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

_LONGEST_LINE = 1 << 24


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
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_LONGEST_LINE)
        try:
            writer.write(request)
            await writer.drain()
            status = await reader.readline()
            if b" 200 " not in status:
                raise ValueError(status.decode("latin-1").strip())
            while (line := await reader.readline()) != b"data: [DONE]\n":
                if not line:
                    raise EOFError("no end")
                if line.startswith(b"data: "):
                    _note(found, line)
        finally:
            writer.close()

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
