"""HTTP: OpenAI's endpoints over the workers. One replica, no torch work."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from farspan.config.schema import ServeConfig
from farspan.engine.detokenize import Detokenizer, StopStrings
from farspan.engine.request import SamplingParams
from farspan.errors import FarspanError, RequestError
from farspan.models.checkpoint import load_tokenizer
from farspan.serve.body import Body, read_body
from farspan.serve.chat import Delta, answer, chat_prompt
from farspan.serve.folder import open_model_folder
from farspan.serve.keys import is_allowed
from farspan.serve.messages import GenerationRequest, WorkerInfo
from farspan.serve.policy import choose_route
from farspan.serve.router import Router
from farspan.serve.trace import TraceBook
from farspan.serve.wire import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    Reply,
    model_list,
    usage,
)

logger = logging.getLogger(__name__)
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Api:
    """The ingress: checks, tokenizes, answers."""

    def __init__(
        self, config: ServeConfig, model_name: str, hashes: tuple[str, ...], prefill: Any, decode: Any
    ) -> None:
        self._config, self._model, self._hashes = config, model_name, hashes
        self._router = Router(prefill, decode)
        self._tokenizer: Any = load_tokenizer(open_model_folder(config.model))
        self._traces = TraceBook()
        self._info: WorkerInfo | None = None
        self._created = int(time.time())

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 once a worker of each role answers."""
        try:
            infos = await self._router.info()
        except FarspanError as problem:
            return JSONResponse({"status": "waiting", "reason": str(problem)}, status_code=503)
        if len({info.layout for info in infos}) != 1:
            reason = "prefill and decode workers have different models or KV layouts"
            return JSONResponse({"status": "mismatched", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready", "roles": [info.role for info in infos]})

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        longest = (await self._limits()).max_context_tokens
        chats = bool(getattr(self._tokenizer, "chat_template", None))
        return JSONResponse(model_list(self._model, self._created, longest, chat_template=chats))

    async def trace(self, request: Request, request_id: str) -> Response:
        self._authorize(request)
        found = self._traces.find(request_id)
        if found is None:
            raise ApiError(404, f"no trace of request {request_id[:80]!r}", code="not_found")
        return JSONResponse(found.report())

    async def completions(self, request: Request) -> Response:
        self._authorize(request)
        asked = await self._body(request, CompletionRequest)
        self._check_model(asked.model)
        # In a thread: millions of characters take seconds, and other answers are on their way.
        prompt = await asyncio.to_thread(self._prompt_tokens, asked)
        return await self._generate(request, asked, prompt, asked.max_tokens, chat=False)

    async def chat(self, request: Request) -> Response:
        self._authorize(request)
        asked = await self._body(request, ChatRequest)
        self._check_model(asked.model)
        prompt = await asyncio.to_thread(chat_prompt, self._tokenizer, asked.messages)
        return await self._generate(request, asked, prompt, asked.answer_tokens, chat=True)

    def _authorize(self, request: Request) -> None:
        if not is_allowed(request.headers.get("authorization"), self._hashes):
            raise ApiError(401, "a valid API key is required: Authorization: Bearer <key>", code="invalid_api_key")

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ApiError(
                404,
                f"model {model[:80]!r} is not served here, {self._model!r} is",
                code="model_not_found",
                param="model",
            )

    async def _body(self, request: Request, shape: type[Body]) -> Body:
        limit = self._config.max_body_bytes
        too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > limit:
                raise too_large
        return read_body(content, shape)

    def _prompt_tokens(self, asked: CompletionRequest) -> list[int]:
        prompt = asked.prompt
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return [int(token) for token in prompt]
        text = prompt if isinstance(prompt, str) else str(prompt[0])
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        return tokens

    def _end_of_text(self, asked: GenerationFields) -> tuple[int, ...]:
        """The tokenizer's own end of text, for models whose config does not name it."""
        end = self._tokenizer.eos_token_id
        return () if asked.ignore_eos or end is None else (int(end),)

    async def _limits(self) -> WorkerInfo:
        """What both kinds of worker can hold."""
        if self._info is None:
            infos = await self._router.info()
            self._info = min(infos, key=lambda info: (info.kv_tokens, info.max_context_tokens))
        return self._info

    async def _generate(
        self, http: Request, asked: GenerationFields, prompt: list[int], max_tokens: int | None, *, chat: bool
    ) -> Response:
        info = await self._limits()
        # Before it travels: the engine's thread would look at every token first.
        if len(prompt) >= info.max_context_tokens:
            most = info.max_context_tokens - 1
            raise RequestError("", f"the prompt has {len(prompt)} tokens, the model takes at most {most}")
        room = min(info.max_context_tokens, info.kv_tokens) - len(prompt)
        params = SamplingParams(
            max_tokens=max_tokens or max(1, room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            logit_bias=tuple(asked.logit_bias.items()),
            min_tokens=asked.min_tokens,
            grammar=asked.response_format.grammar,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            stop_token_ids=frozenset((*asked.stop_token_ids, *self._end_of_text(asked))),
            ignore_eos=asked.ignore_eos,
        )
        given = http.headers.get("x-request-id") or ""
        public_id = given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex
        # The engine's id is ours alone: a client that repeats its own cannot reach another request.
        request = GenerationRequest(uuid.uuid4().hex, tuple(prompt), params)
        trace = self._traces.open(public_id, len(prompt))
        deltas = answer(
            request,
            choose_route(len(prompt), self._config.transfer.colocate_below_tokens),
            self._router,
            Detokenizer(self._tokenizer),
            StopStrings(asked.stop),
            trace,
        )
        reply = Reply(public_id, self._model, chat)
        # Before the first byte of an answer its status can still be an error.
        first = await anext(deltas)
        if asked.stream:
            events = _events(first, deltas, reply, len(prompt), asked.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return JSONResponse(await _collect(first, deltas, reply, len(prompt)))


async def _collect(first: Delta, deltas: AsyncGenerator[Delta], reply: Reply, num_prompt: int) -> dict[str, Any]:
    last, text = first, first.text
    async for delta in deltas:
        last, text = delta, text + delta.text
    return reply.whole(text, last.finish or "length", usage(num_prompt, last.num_tokens))


async def _events(
    first: Delta, deltas: AsyncGenerator[Delta], reply: Reply, num_prompt: int, include_usage: bool
) -> AsyncIterator[str]:
    last = first
    try:
        yield _event(reply.chunk(first.text, first.finish, first=True))
        async for delta in deltas:
            last = delta
            if delta.text or delta.finish:
                yield _event(reply.chunk(delta.text, delta.finish, first=False))
        if include_usage:
            yield _event(reply.usage_chunk(usage(num_prompt, last.num_tokens)))
        yield "data: [DONE]\n\n"
    except FarspanError as problem:
        # The status line is gone: an error event and no [DONE] is how clients see that the answer is not whole.
        yield _event(as_api_error(problem).body())
    except Exception:
        logger.exception("an answer broke off")
        yield _event(internal_error().body())
    finally:
        await deltas.aclose()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def as_api_error(problem: FarspanError) -> ApiError:
    if isinstance(problem, RequestError):
        return ApiError(400, problem.reason, code="invalid_request")
    return internal_error()


def internal_error() -> ApiError:
    """What a client may know about what we got wrong."""
    return ApiError(500, "the request could not be completed; try again", code="internal_error")
