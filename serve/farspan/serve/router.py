"""The workers as the ingress sees them: a few verbs over Serve handles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.serve.faults import being_cancelled
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, StreamItem, WorkerInfo
from farspan.serve.relay import Relay

logger = logging.getLogger(__name__)

_CONTROL_TIMEOUT_S = 10.0
# A prefill worker of its own is an optimisation: while none is there, prompts are computed where they are decoded.
_ASSIGN_TIMEOUT_S = 3.0


class Workers(Protocol):
    """What `answer` asks of the cluster."""

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed: ...

    def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncGenerator[StreamItem]: ...

    def release(self, ticket_id: str) -> None:
        """Say that the pages are not needed any more; returns at once."""
        ...

    def cancel(self, request_id: str) -> None:
        """Say that nobody wants the answer any more; returns at once."""
        ...


class Router:
    """`Workers` over the deployments' handles. A lost worker is a `Failed` value like any other failure."""

    def __init__(self, prefill: Any, decode: Any) -> None:
        self._prefill, self._decode = prefill, decode
        self._prefill_stream, self._decode_stream = prefill.options(stream=True), decode.options(stream=True)
        self._relays: dict[str, Relay] = {}
        """Of each request whose prompt is computed on a worker of its own, until it is answered."""
        self._errands: set[asyncio.Task[None]] = set()

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed:
        """While the prompt is computed, the decode worker that will answer fetches the pages that are there."""
        relay = self._relays[request.request_id] = Relay(self._decode_stream, request)
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(_ASSIGN_TIMEOUT_S):
                    choice = self._prefill_stream.prefill_in_parts.choose_replica(request)
                    chosen = await stack.enter_async_context(choice)
                answer = await _heard(self._prefill_stream.dispatch(chosen, request), relay)
        except TimeoutError:
            return Failed(ClusterError(f"no prefill worker was free within {_ASSIGN_TIMEOUT_S:g} s"))
        except (RayError, RayServeException) as problem:
            return Failed(ClusterError(f"the prefill worker was lost: {type(problem).__name__}"))
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            return Failed(ClusterError("the call of the prefill worker was given up"))
        if isinstance(answer, Prefilled) and answer.ticket is None:
            # The answer is over with its first token: nobody will ask for the pages that were fetched.
            self._relays.pop(request.request_id, None)
            relay.end()
            if relay.has_told:
                self._send(self._decode, "cancel", request.request_id)
        return answer

    async def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncGenerator[StreamItem]:
        relay = self._relays.pop(request.request_id, None)
        try:
            if relay is not None and (chosen := relay.settle()) is not None:
                told = _items(self._decode_stream.dispatch(chosen, request, answered, ticket))
                async with aclosing(told) as items:
                    given = False
                    async for item in items:
                        if not given and isinstance(item, Failed) and isinstance(item.error, ClusterError):
                            # It was lost while the prompt was computed: any other one can do the same.
                            break
                        given = True
                        yield item
                    else:
                        return
            async with aclosing(_items(self._decode_stream.resume.remote(request, answered, ticket))) as items:
                async for item in items:
                    yield item
        finally:
            if relay is not None:
                relay.end()

    def release(self, ticket_id: str) -> None:
        self._send(self._prefill, "release", ticket_id)

    def cancel(self, request_id: str) -> None:
        if relay := self._relays.pop(request_id, None):
            relay.end()
        self._send(self._prefill, "cancel", request_id)
        self._send(self._decode, "cancel", request_id)

    async def info(self) -> list[WorkerInfo]:
        """What one worker of each role says that answers in time. Raises ClusterError when none does."""
        calls = [handle.info.remote() for handle in (self._prefill, self._decode)]
        told = await asyncio.gather(*(_told(call) for call in calls))
        infos = [info for info in told if isinstance(info, WorkerInfo)]
        if not infos:
            raise ClusterError(f"no worker answers: {'; '.join(str(problem) for problem in told)}")
        return infos

    def _send(self, handle: Any, method: str, argument: str) -> None:
        # To all replicas: which one holds the request or the ticket is their business, and repeating is harmless.
        errand = asyncio.ensure_future(_delivered(handle.broadcast(method, argument), method))
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)


async def _heard(stream: Any, relay: Relay) -> Prefilled | Failed:
    """What a prefill worker says in the end; what it offers on the way is passed on."""
    answer: Prefilled | Failed = Failed(ClusterError("the prefill worker ended without an answer"))
    over = False
    try:
        async for item in stream:
            if isinstance(item, KvOffer):
                relay.tell(item)
            else:
                answer = item
        over = True
    finally:
        if not over:
            stream.cancel()
    return answer


async def _items(stream: Any) -> AsyncGenerator[StreamItem]:
    """What a decode worker says, and that it was lost, if it was."""
    over = False
    try:
        async for item in stream:
            yield item
        over = True
    except (RayError, RayServeException) as problem:
        over = True
        yield Failed(ClusterError(f"the decode worker was lost: {type(problem).__name__}"))
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        over = True
        yield Failed(ClusterError("the call of the decode worker was given up"))
    finally:
        if not over:
            stream.cancel()


async def _told(response: Any) -> WorkerInfo | str:
    """What a worker says of itself, or why it says nothing."""
    try:
        return await asyncio.wait_for(_awaited(response), _CONTROL_TIMEOUT_S)
    except (TimeoutError, RayError, RayServeException, ClusterError) as problem:
        return str(problem) if isinstance(problem, ClusterError) else type(problem).__name__


async def _awaited(response: Any) -> WorkerInfo:
    try:
        info: WorkerInfo = await response
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        raise ClusterError("a call of a worker was given up") from None
    return info


async def _delivered(response: Any, method: str) -> None:
    try:
        await asyncio.wait_for(response.results_async(), _CONTROL_TIMEOUT_S)
    except (TimeoutError, RayError, RayServeException, RuntimeError) as problem:
        # A lease ends by itself and a dead worker holds nothing.
        logger.warning("%s was not delivered: %s", method, type(problem).__name__)
