"""The bytes of an answer: events while it comes, or one object at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from farspan.errors import FarspanError
from farspan.serve.choices import ClientGoneError, unless_gone
from farspan.serve.faults import as_api_error, internal_error
from farspan.serve.reply import Counted, Reply, Step
from farspan.serve.shape import ApiError
from farspan.serve.wire import GenerationFields

logger = logging.getLogger(__name__)

# Made once: json.dumps would make it anew for every event.
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventStream(StreamingResponse):
    """Server-sent events; closed at once when the client leaves, also between two events."""

    def __init__(self, events: AsyncGenerator[str], headers: Mapping[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache", **headers})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await unless_gone(receive, self.stream_response(send))
        except (ClientGoneError, OSError):
            # Nobody is left who could be told anything.
            return


async def collect(first: Step, steps: AsyncGenerator[Step], reply: Reply, counted: Counted) -> dict[str, Any]:
    """The whole answer; the steps are over."""
    choices: dict[int, list[Step]] = {first.delta.index: [first]}
    async with aclosing(steps):
        async for step in steps:
            choices.setdefault(step.delta.index, []).append(step)
    return reply.whole([choices[index] for index in sorted(choices)], counted)


async def events(
    first: Step, steps: AsyncGenerator[Step], reply: Reply, counted: Counted, asked: GenerationFields
) -> AsyncGenerator[str]:
    """The answer step by step."""
    running, follows = counted if asked.usage_in_every_chunk else None, asked.include_usage
    try:
        yield _event(reply.chunk(first, running, usage_follows=follows))
        async for step in steps:
            if _tells(step, asked):
                yield _event(reply.chunk(step, running, usage_follows=follows))
        if asked.include_usage:
            yield _event(reply.usage_chunk(counted))
        yield "data: [DONE]\n\n"
    except (ApiError, FarspanError) as problem:
        # The status line is gone: an error event and no [DONE] is how clients see that the answer is not whole.
        yield _event((problem if isinstance(problem, ApiError) else as_api_error(problem)).body())
    except Exception:
        logger.exception("an answer broke off")
        yield _event(internal_error().body())
    finally:
        await steps.aclose()


def _tells(step: Step, asked: GenerationFields) -> bool:
    """Whether a client learns anything from a step: tokens may come before their text."""
    told_by_token = asked.return_token_ids or asked.num_top_logprobs is not None
    return bool(step.first or step.said.text or step.said.calls or step.finish or told_by_token)


def _event(content: dict[str, Any]) -> str:
    return f"data: {_ENCODE(content)}\n\n"
