"""Several models behind one address: each request goes to the `Api` of the model it names. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from farspan.serve.api import Api, no_trace
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.lineup import refuse_shared_names
from farspan.serve.metrics import by_model, rendered
from farspan.serve.naming import unknown_model
from farspan.serve.shape import ApiError
from farspan.serve.wire import CompletionRequest, DetokenizeRequest


class Several:
    """What `Api` is for one model. Keys, and how a request is read, are those of the first."""

    def __init__(self, apis: Sequence[Api]) -> None:
        """Raises ConfigError when a name would mean two of them."""
        refuse_shared_names([api.names for api in apis])
        self._apis, self._door = tuple(apis), apis[0]
        self._of_name = {name: api for api in apis for name in api.names.all}
        self._listed = [name for api in apis for name in api.names.listed]

    def close(self) -> None:
        for api in self._apis:
            api.close()

    async def health(self) -> Response:
        return await self._door.health()

    async def ready(self) -> Response:
        """200 once every model is ready."""
        told = await asyncio.gather(*(api.readiness() for api in self._apis))
        models = {api.names.model: content for api, (_, content) in zip(self._apis, told, strict=True)}
        waiting = next((content["status"] for status, content in told if status != 200), None)
        status = 200 if waiting is None else 503
        return JSONResponse({"status": waiting or "ready", "models": models}, status_code=status)

    async def models(self, request: Request) -> Response:
        """All of them, also while the workers of one are away."""
        self._door.authorize(request)
        longest = await asyncio.gather(*(api.context() for api in self._apis))
        entries = [api.entries(context) for api, context in zip(self._apis, longest, strict=True)]
        return JSONResponse({"object": "list", "data": [entry for each in entries for entry in each]})

    async def model(self, request: Request, name: str) -> Response:
        self._door.authorize(request)
        return await self._api(name).entry(name)

    async def trace(self, request: Request, request_id: str) -> Response:
        key = self._door.authorize(request)
        for api in self._apis:
            if (found := api.report(key, request_id)) is not None:
                return JSONResponse(found)
        raise no_trace(request_id)

    async def completions(self, request: Request) -> Response:
        heard = await self._door.heard(request, CompletionRequest)
        return await self._api(heard.asked.model).complete(request, heard)

    async def chat(self, request: Request) -> Response:
        heard = await self._door.heard(request, ChatRequest)
        return await self._api(heard.asked.model).converse(request, heard)

    async def tokenize(self, request: Request) -> Response:
        heard = await self._door.heard(request, TokenizeRequest)
        return await self._api(heard.asked.model).tokens(heard)

    async def detokenize(self, request: Request) -> Response:
        heard = await self._door.heard(request, DetokenizeRequest)
        return await self._api(heard.asked.model).text(heard)

    async def metrics(self, request: Request) -> Response:
        self._door.authorize(request)
        measured = await asyncio.gather(*(api.measured() for api in self._apis))
        named = dict(zip((api.names.model for api in self._apis), measured, strict=True))
        return Response(rendered(by_model(named)), media_type=CONTENT_TYPE_LATEST)

    def _api(self, asked: str | None) -> Api:
        """That of the model a client means. Raises ApiError: none of that name, or no name at all."""
        if asked is None:
            told = ", ".join(map(repr, self._listed))
            raise ApiError(400, f"model: must be one of {told}", code="missing_required_parameter", param="model")
        if asked not in self._of_name:
            raise unknown_model(asked, self._listed)
        return self._of_name[asked]
