"""The workers as one request sees them: those of its way, and others where one of them is lost. The guide learns."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from farspan.errors import ClusterError
from farspan.kv.ticket import KvTicket
from farspan.serve.guide import Guide
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, StreamItem
from farspan.serve.policy import Place, Route


class PlacedWorkers(Protocol):
    """What is asked of the cluster when it is known whom to ask."""

    async def prefill(self, request: GenerationRequest, place: Place | None = None) -> Prefilled | Failed: ...

    def resume(
        self,
        request: GenerationRequest,
        answered: tuple[int, ...],
        ticket: KvTicket | None,
        place: Place | None = None,
    ) -> AsyncGenerator[StreamItem]: ...

    def release(self, ticket_id: str, place: Place | None = None) -> None: ...

    def cancel(self, request_id: str) -> None: ...


class Along:
    """`Workers` of one request."""

    def __init__(self, workers: PlacedWorkers, guide: Guide, route: Route) -> None:
        self._workers, self._guide, self._route = workers, guide, route
        self._weights = route.weights
        self._lost: set[str] = set()
        self._num_tokens, self._first_at_s, self._ended = 0, 0.0, False

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        asked_at_s = time.monotonic()
        answer = await self._workers.prefill(self._bound(request), self._route.prefill)
        if isinstance(answer, Failed):
            self._lose(self._route.prefill, answer)
        else:
            self._guide.first_token(self._route, len(request.prompt), answer.num_cached, time.monotonic() - asked_at_s)
            self._count(request, 1, answer.finish)
        return answer

    async def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncGenerator[StreamItem]:
        if not answered:
            # Nothing was said yet: any model may say it.
            self._weights = self._route.weights if not self._lost else ""
        place = self._place(request)
        asked_at_s = time.monotonic()
        async with aclosing(self._workers.resume(self._bound(request), answered, ticket, place)) as items:
            async for item in items:
                if isinstance(item, Failed):
                    self._lose(place, item)
                elif isinstance(item, Pulled):
                    self._guide.pulled(item.num_bytes, item.seconds)
                else:
                    if self._num_tokens == 0 and not self._lost:
                        seconds = time.monotonic() - asked_at_s
                        self._guide.first_token(self._route, len(request.prompt), item.num_cached, seconds)
                    self._count(request, len(item.tokens), item.finish)
                yield item

    def release(self, ticket_id: str) -> None:
        self._workers.release(ticket_id, self._route.prefill)

    def cancel(self, request_id: str) -> None:
        self._workers.cancel(request_id)

    def _place(self, request: GenerationRequest) -> Place | None:
        if not self._lost:
            return self._route.decode
        again = self._guide.route(replace(request, weights=self._weights), self._lost)
        self._weights = self._weights or again.weights
        # Prompt and tokens so far are computed where it goes on.
        return again.decode

    def _bound(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, weights=self._weights)

    def _lose(self, place: Place | None, failed: Failed) -> None:
        if isinstance(failed.error, ClusterError) and place is not None:
            self._lost.add(place.worker)
            self._guide.lost(place)

    def _count(self, request: GenerationRequest, count: int, finish: str | None) -> None:
        now_s = time.monotonic()
        if self._num_tokens == 0:
            self._first_at_s = now_s
        self._num_tokens += count
        self._guide.tokens(count)
        if finish is not None and not self._ended:
            self._ended = True
            if not self._lost:
                self._guide.answered(self._route, len(request.prompt), self._num_tokens, now_s - self._first_at_s)
