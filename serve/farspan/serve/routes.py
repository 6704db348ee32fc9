"""Addresses of the API, and the shape of every error: OpenAI's, whatever went wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farspan.errors import FarspanError
from farspan.serve.api import Api
from farspan.serve.choices import ClientGoneError
from farspan.serve.faults import as_api_error, internal_error
from farspan.serve.openapi import describe
from farspan.serve.several import Several
from farspan.serve.shape import ApiError

logger = logging.getLogger(__name__)


def build_http() -> FastAPI:
    """The routes, in front of the replica they run in."""

    def here() -> Api | Several:
        api: Api | Several = serve.get_replica_context().servable_object
        return api

    return route(here)


def route(here: Callable[[], Api | Several]) -> FastAPI:
    """The routes, in front of what `here` finds."""
    http = FastAPI(title="farspan", docs_url=None, redoc_url=None, openapi_url=None)
    described = describe()
    http.add_middleware(LastResort)
    http.add_exception_handler(ApiError, _api_error)
    http.add_exception_handler(FarspanError, _farspan_error)
    http.add_exception_handler(HTTPException, _http_error)
    http.add_exception_handler(ClientGoneError, _nobody_there)

    @http.get("/health")
    async def health() -> Response:
        return await here().health()

    @http.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(described)

    @http.get("/ready")
    async def ready() -> Response:
        return await here().ready()

    @http.get("/v1/models")
    async def models(request: Request) -> Response:
        return await here().models(request)

    # Names of models may have slashes.
    @http.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> Response:
        return await (here().model(request, model_id) if model_id else here().models(request))

    @http.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await here().completions(request)

    @http.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await here().chat(request)

    @http.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await here().tokenize(request)

    @http.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await here().detokenize(request)

    @http.get("/metrics")
    async def metrics(request: Request) -> Response:
        return await here().metrics(request)

    @http.get("/v1/requests/{request_id}/trace")
    async def trace(request: Request, request_id: str) -> Response:
        return await here().trace(request, request_id)

    return http


class LastResort:
    """Answers 500 for an exception nobody expected, without a word of it; the traceback goes to the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            # An answer that has begun can only be cut off: its status is gone.
            if started or scope["type"] != "http":
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await _answer(internal_error())(scope, receive, send)


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, ApiError)
    return _answer(problem)


async def _farspan_error(_: Request, problem: Exception) -> Response:
    assert isinstance(problem, FarspanError)
    return _answer(as_api_error(problem))


async def _nobody_there(_: Request, problem: Exception) -> Response:
    # nginx's number for it: only logs see it.
    return Response(status_code=499)


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {problem.detail}"
    response = _answer(ApiError(problem.status_code, message, code="not_found" if problem.status_code == 404 else None))
    response.headers.update(problem.headers or {})
    return response
