"""The workers as one request sees them: those of its way, and others where one of them is lost. The guide learns."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from farspan.errors import ClusterError, EngineError, RequestError
from farspan.kv.ticket import KvTicket
from farspan.serve.guide import Guide
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, StreamItem
from farspan.serve.policy import Place, Route


class PlacedWorkers(Protocol):
    """What is asked of the cluster when it is known whom to ask."""

    async def prefill(
        self, request: GenerationRequest, place: Place | None = None, answering: Place | None = None
    ) -> Prefilled | Failed: ...

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
        self._rerouted = False
        """From then on times say nothing of the way that was chosen."""
        self._num_tokens, self._first_at_s, self._last_at_s = 0, 0.0, 0.0

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        asked_at_s = time.monotonic()
        answer = await self._workers.prefill(self._bound(request), self._route.prefill, self._route.decode)
        if isinstance(answer, Failed):
            self._lose(self._route.prefill, answer)
        elif self._num_tokens == 0:
            self._guide.first_token(self._route, len(request.prompt), answer.num_cached, time.monotonic() - asked_at_s)
            self._count(1)
        return answer

    async def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncGenerator[StreamItem]:
        place, failed = self._route.decode, False
        asked_at_s = time.monotonic()
        try:
            async with aclosing(self._workers.resume(self._bound(request), answered, ticket, place)) as items:
                async for item in items:
                    failed = isinstance(item, Failed)
                    self._note(request, place, item, asked_at_s)
                    yield item
        finally:
            # A stop string ends an answer where the engine would go on.
            if not failed:
                self._end(request)

    def reroute(self, request: GenerationRequest, *, begun: bool) -> bool:
        """By what is predicted: where its pages are cached, on one worker, or again on two."""
        weights = self._weights if begun else ""
        self._route = self._guide.route(replace(request, weights=weights), self._lost)
        self._weights, self._rerouted = weights or self._route.weights, True
        return self._route.split

    def release(self, ticket_id: str) -> None:
        self._workers.release(ticket_id, self._route.prefill)

    def cancel(self, request_id: str) -> None:
        self._workers.cancel(request_id)

    def _bound(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, weights=self._weights)

    def _lose(self, place: Place | None, failed: Failed) -> None:
        # Also one whose engine has ended, as by the loss of a rank, and that Serve has not replaced yet. A request that
        # is refused is no loss.
        over = isinstance(failed.error, ClusterError | EngineError) and not isinstance(failed.error, RequestError)
        if over and place is not None:
            self._lost.add(place.worker)
            self._guide.lost(place)

    def _note(self, request: GenerationRequest, place: Place | None, item: StreamItem, asked_at_s: float) -> None:
        if isinstance(item, Failed):
            self._lose(place, item)
        elif isinstance(item, Pulled):
            self._guide.pulled(item.num_bytes, item.seconds)
        else:
            if self._num_tokens == 0 and not self._rerouted:
                seconds = time.monotonic() - asked_at_s
                self._guide.first_token(self._route, len(request.prompt), item.num_cached, seconds)
            self._count(len(item.tokens))

    def _count(self, count: int) -> None:
        self._last_at_s = time.monotonic()
        if self._num_tokens == 0:
            self._first_at_s = self._last_at_s
        self._num_tokens += count
        self._guide.tokens(count)

    def _end(self, request: GenerationRequest) -> None:
        if self._num_tokens and not self._rerouted:
            self._guide.answered(self._route, len(request.prompt), self._num_tokens, self._last_at_s - self._first_at_s)
