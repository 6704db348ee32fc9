"""HTTP: OpenAI's endpoints over the workers. One replica, no torch work."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from starlette.requests import ClientDisconnect

from farspan.config.schema import ServeConfig
from farspan.errors import ClusterError, FarspanError, RequestError
from farspan.models.checkpoint import load_tokenizer
from farspan.models.folder import open_model_folder
from farspan.serve.answering import Answering, Question, Surroundings
from farspan.serve.body import Body, ignored_header, read_body
from farspan.serve.choices import ClientGoneError, unless_gone
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.keys import ApiKey, find_key
from farspan.serve.limits import Limits
from farspan.serve.messages import Caller, WorkerInfo
from farspan.serve.metrics import Metrics, rendered
from farspan.serve.naming import ModelNames
from farspan.serve.prompt import detokenized, tokenized, unread
from farspan.serve.questions import chat_question, completion_question
from farspan.serve.readiness import Readiness
from farspan.serve.reply import Reply, model_entries
from farspan.serve.router import Workers
from farspan.serve.shape import ApiError
from farspan.serve.spans import Spans, exporter_to
from farspan.serve.stream import EventStream, collect, events
from farspan.serve.text import TokenNames
from farspan.serve.tools import told_by_tool
from farspan.serve.trace import TraceBook, request_name
from farspan.serve.ways import LengthWays, Ways
from farspan.serve.wire import CompletionRequest, DetokenizeRequest, GenerationFields

_LARGE_BODY = 65_536
_DEADLINE_HEADER = "x-farspan-deadline-s"
_SESSION_HEADER = "x-session-id"


class AllWorkers(Workers, Protocol):
    """`Workers` that also say how they are."""

    async def info(self) -> list[WorkerInfo]:
        """All that answer, nothing where there is none. Raises ClusterError when none of those that there are does."""
        ...


@dataclass(frozen=True, slots=True)
class Heard(Generic[Body]):
    """A request whose key and shape are right."""

    key: ApiKey
    asked: Body
    ignored: tuple[str, ...]
    """Places of fields nobody knows."""
    began_s: float
    """When its first bytes were here, on the monotonic clock."""


class Api:
    """The ingress of one model: checks, tokenizes, answers."""

    def __init__(
        self,
        config: ServeConfig,
        model_name: str,
        keys: tuple[ApiKey, ...],
        workers: AllWorkers,
        ways: Ways | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`ways`: none for workers nobody can tell apart; `limits`: of the keys, where models share them."""
        self._ways = ways
        self._config, self._keys, self._workers = config, keys, workers
        self.names = ModelNames(model_name, config.engine.adapters)
        self._tokenizer: Any = load_tokenizer(open_model_folder(config.model))
        self._token_names = TokenNames(self._tokenizer)
        self._limits, self._metrics = limits or Limits(keys), Metrics()
        self._needed = sum(role.least > 0 for role in (config.prefill, config.decode))
        self._traces, self._readiness = TraceBook(), Readiness(self._met, needed=self._needed)
        collector = config.telemetry.otlp_endpoint
        self._spans = Spans(None if collector is None else exporter_to(collector))
        self._info: WorkerInfo | None = None
        self._created = int(time.time())

    def close(self) -> None:
        """Send what was not sent yet."""
        self._spans.close()

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 once a worker of each role answers that may not be empty, and all that answer fit together."""
        status, told = await self.readiness()
        return JSONResponse(told, status_code=status)

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        """(status, content) of the answer of `ready`."""
        return await self._readiness.told()

    async def _met(self) -> list[WorkerInfo]:
        """All workers that answer. Whoever is told that they are ready is not sent to some of them only."""
        infos = await self._workers.info()
        if self._ways is not None:
            await self._ways.met(info.worker for info in infos)
        return infos

    async def models(self, request: Request) -> Response:
        self.authorize(request)
        return JSONResponse({"object": "list", "data": self.entries(await self.context())})

    async def model(self, request: Request, name: str) -> Response:
        self.authorize(request)
        return await self.entry(name)

    async def entry(self, name: str) -> Response:
        """The model of that name, however it is listed. Raises ApiError 404."""
        listed = self.names.adapter(name) or self.names.model
        entry = next(one for one in self.entries(await self.context()) if one["id"] == listed)
        return JSONResponse({**entry, "id": name})

    async def context(self) -> int | None:
        """The longest context of this model; none, while no worker says it."""
        with suppress(FarspanError):
            return (await self._smallest()).max_context_tokens
        return None

    def entries(self, longest: int | None) -> list[dict[str, Any]]:
        """This model and its adapters, as a list of models tells them."""
        chats = bool(getattr(self._tokenizer, "chat_template", None))
        return model_entries(self.names.listed, self._created, longest, chat_template=chats)

    async def trace(self, request: Request, request_id: str) -> Response:
        found = self.report(self.authorize(request), request_id)
        if found is None:
            raise no_trace(request_id)
        return JSONResponse(found)

    def report(self, key: ApiKey, request_id: str) -> dict[str, Any] | None:
        """What a request of this key took, where it was asked here."""
        found = self._traces.find(request_id, key.derived("tenant"))
        return None if found is None else found.report()

    async def completions(self, request: Request) -> Response:
        return await self.complete(request, await self.heard(request, CompletionRequest))

    async def complete(self, request: Request, heard: Heard[CompletionRequest]) -> Response:
        question = completion_question(self._tokenizer, heard.asked)
        return await self._answer(request, heard, question)

    async def chat(self, request: Request) -> Response:
        return await self.converse(request, await self.heard(request, ChatRequest))

    async def converse(self, request: Request, heard: Heard[ChatRequest]) -> Response:
        question = chat_question(self._tokenizer, heard.asked, self._config.tool_format)
        try:
            return await self._answer(request, heard, question)
        except RequestError as problem:
            raise told_by_tool(problem, question.grammar) from None

    async def tokenize(self, request: Request) -> Response:
        return await self.tokens(await self.heard(request, TokenizeRequest))

    async def tokens(self, heard: Heard[TokenizeRequest]) -> Response:
        asked = heard.asked
        self.names.adapter(asked.model or self.names.model)
        with self._limits.of(heard.key).admitted():
            tokens = await asyncio.to_thread(tokenized, self._tokenizer, asked)
        told: dict[str, Any] = {"count": len(tokens), "tokens": tokens}
        if (longest := await self.context()) is not None:
            told["max_model_len"] = longest
        if asked.return_token_strs:
            told["token_strs"] = [self._token_names.name_of(token) for token in tokens]
        return JSONResponse(told, headers=ignored_header((*heard.ignored, *unread(self._tokenizer, asked))))

    async def detokenize(self, request: Request) -> Response:
        return await self.text(await self.heard(request, DetokenizeRequest))

    async def text(self, heard: Heard[DetokenizeRequest]) -> Response:
        asked = heard.asked
        self.names.adapter(asked.model or self.names.model)
        with self._limits.of(heard.key).admitted():
            text = await asyncio.to_thread(detokenized, self._tokenizer, asked.tokens)
        return JSONResponse({"prompt": text}, headers=ignored_header(heard.ignored))

    async def metrics(self, request: Request) -> Response:
        self.authorize(request)
        return Response(rendered(await self.measured()), media_type=CONTENT_TYPE_LATEST)

    async def measured(self) -> list[Metric]:
        """Every number of this model."""
        infos: list[WorkerInfo] = []
        # Without workers the other numbers are still worth reading.
        with suppress(FarspanError):
            infos = await self._workers.info()
        return self._metrics.families(infos)

    async def heard(self, request: Request, shape: type[Body]) -> Heard[Body]:
        """A request of that shape. Raises ApiError for one without a key, too large, too slow, or of another shape."""
        began_s = time.monotonic()
        key = self.authorize(request)
        return Heard(key, *await self._body(request, shape), began_s)

    def authorize(self, request: Request) -> ApiKey:
        """The key of a request. Raises ApiError 401."""
        key = find_key(request.headers.get("authorization"), self._keys)
        if key is None:
            raise ApiError(401, "a valid API key is required: Authorization: Bearer <key>", code="invalid_api_key")
        return key

    async def _body(self, request: Request, shape: type[Body]) -> tuple[Body, tuple[str, ...]]:
        limit = self._config.max_body_bytes
        too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
        length = request.headers.get("content-length") or "0"
        if not (length.isascii() and length.isdecimal()):
            raise ApiError(
                400, "content-length: must be a number of bytes", code="invalid_value", param="content-length"
            )
        # Longer numbers than any body's are not even read.
        if len(length) > len(str(limit)) + 10 or int(length) > limit:
            raise too_large
        content = bytearray()
        try:
            # Who sends a byte now and then would hold a place for ever.
            async with asyncio.timeout(self._config.body_timeout_s):
                async for piece in request.stream():
                    content += piece
                    if len(content) > limit:
                        raise too_large
        except TimeoutError:
            message = f"the body was not whole within {self._config.body_timeout_s:g} s"
            raise ApiError(408, message, code="body_too_slow") from None
        except ClientDisconnect:
            raise ClientGoneError from None
        if not content and request.headers.get("upgrade"):
            # Servers of HTTP/1.1 take what follows such a head for another protocol.
            message = "the body was lost: send requests without Upgrade (in Java: HttpClient.Version.HTTP_1_1)"
            raise ApiError(400, message, code="invalid_value", param="upgrade")
        if len(content) < _LARGE_BODY:
            return read_body(content, shape)
        # In a thread: other answers are on their way.
        return await asyncio.to_thread(read_body, content, shape)

    async def _smallest(self) -> WorkerInfo:
        """What all workers can hold, of those that answer. Raises ClusterError when none does."""
        if self._info is not None:
            return self._info
        if not (infos := await self._workers.info()):
            raise ClusterError("no worker is there")
        smallest = min(infos, key=lambda info: (info.kv_tokens, info.max_context_tokens))
        if len({info.role for info in infos}) >= max(1, self._needed):
            self._info = smallest
        return smallest

    def _caller(self, http: Request, heard: Heard[Any], asked: GenerationFields) -> Caller:
        key, left_s = heard.key, heard.began_s + self._config.request_timeout_s - time.monotonic()
        given_s = _deadline_s(http, asked)
        return Caller(
            tenant=key.derived("tenant"),
            session=_session(http, key, asked),
            salt=_salt(key, asked.cache_salt, shared=self._config.share_prefixes),
            # Lower is answered first over HTTP, higher in the engine.
            priority=-max(asked.priority, key.allowance.priority),
            deadline_at_s=time.time() + (left_s if given_s is None else min(left_s, given_s)),
            adapter=self.names.adapter(asked.model),
        )

    async def _answer(self, http: Request, heard: Heard[Any], question: Question) -> Response:
        arrived_s, asked = time.monotonic(), question.asked
        caller, ignored = self._caller(http, heard, asked), ignored_header((*heard.ignored, *question.passed_over))
        ways = self._ways or LengthWays(self._workers, self._config)
        if ways.asleep:
            await unless_gone(http.receive, ways.ready(caller.deadline_at_s))
        around = Surroundings(
            ways=ways,
            tokenizer=self._tokenizer,
            info=await self._smallest(),
            max_wait_s=self._config.objectives.max_wait_s,
            metrics=self._metrics,
        )
        public_id = request_name(http.headers.get("x-request-id") or "")
        trace = self._traces.open(public_id, 0, caller.tenant, arrived_s)
        answering = Answering(question, around, caller, self._limits.of(heard.key), trace)
        reply = Reply(public_id, asked.model, question.style, self._token_names)
        route = http.url.path
        steps = self._spans.told(answering.steps(), route, http.headers, asked.model, trace, answering.counted)
        try:
            # Before the first byte of an answer its status can still be an error.
            first = await unless_gone(http.receive, anext(steps))
            if not asked.stream:
                body = await unless_gone(http.receive, collect(first, steps, reply, answering.counted))
                return JSONResponse(body, headers=ignored)
        except BaseException:
            await steps.aclose()
            raise
        return EventStream(events(first, steps, reply, answering.counted, asked), ignored)


def no_trace(request_id: str) -> ApiError:
    """What a client hears that asks for a request nobody knows."""
    return ApiError(404, f"no trace of request {request_id[:80]!r}", code="not_found")


def _deadline_s(http: Request, asked: GenerationFields) -> float | None:
    """The header is for whoever cannot change the body; the earlier of both holds."""
    header = http.headers.get(_DEADLINE_HEADER)
    if header is None:
        return asked.deadline_s
    try:
        given = float(header)
    except ValueError:
        given = 0.0
    if not 0 < given < float("inf"):
        message = f"{_DEADLINE_HEADER}: must be a number of seconds above 0"
        raise ApiError(400, message, code="invalid_value", param=_DEADLINE_HEADER)
    return given if asked.deadline_s is None else min(given, asked.deadline_s)


def _session(http: Request, key: ApiKey, asked: GenerationFields) -> str:
    """What a client says belongs together, in a form that tells nobody what it said."""
    said = http.headers.get(_SESSION_HEADER) or asked.cache_salt
    return key.derived(f"session {said}") if said else ""


def _salt(key: ApiKey, cache_salt: str | None, *, shared: bool) -> str:
    """Only requests of one salt find each other's pages: of one key, or of all; and of one cache_salt among them."""
    if not shared:
        return key.derived(f"prefix {cache_salt or ''}")
    return "" if cache_salt is None else hashlib.sha256(cache_salt.encode()).hexdigest()
