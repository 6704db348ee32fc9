"""The workers as the ingress sees them: a few verbs over Serve handles."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from farspan.errors import ClusterError
from farspan.kv.ticket import KvOffer, KvTicket
from farspan.serve.faults import LOST, being_cancelled
from farspan.serve.life import SILENT_S, Watch, unless_silent
from farspan.serve.line import Lines, followed
from farspan.serve.load import WorkerLoad
from farspan.serve.mailbox import Inbox
from farspan.serve.messages import Elsewhere, Failed, GenerationRequest, Prefilled, StreamItem, WorkerInfo
from farspan.serve.policy import Place
from farspan.serve.quotas import Orders
from farspan.serve.relay import Relay

logger = logging.getLogger(__name__)

_CONTROL_TIMEOUT_S = 10.0
# A worker that says nothing of itself for so long is not one to send somebody to.
_REPORT_TIMEOUT_S = 2.0
# A prefill worker of its own is an optimisation: while none is there, prompts are computed where they are decoded.
_ASSIGN_TIMEOUT_S = 3.0
_REMEMBERED_S = 60.0

Hear = Callable[[WorkerLoad, float], None]
"""Told of a worker's answer, and when it was asked."""


class Workers(Protocol):
    """What `answer` asks of the cluster."""

    async def prefill(self, request: GenerationRequest) -> Prefilled | Failed: ...

    def resume(
        self, request: GenerationRequest, answered: tuple[int, ...], ticket: KvTicket | None
    ) -> AsyncGenerator[StreamItem]: ...

    def reroute(self, request: GenerationRequest, *, begun: bool) -> bool:
        """Choose another way after a failure; whether the prompt is computed on a worker of its own again.

        `begun`: something was said already, and no other model goes on with it.
        """
        ...

    def release(self, ticket_id: str) -> None:
        """Say that the pages are not needed any more; returns at once."""
        ...

    def cancel(self, request_id: str) -> None:
        """Say that nobody wants the answer any more; returns at once."""
        ...


@dataclass(frozen=True, slots=True)
class _Heard:
    """That a worker said how it stands."""

    worker: str
    deployment: str
    at_s: float


class Router:
    """Workers over the deployments' handles. A lost worker is a `Failed` value like any other failure.

    Calls are begun in contexts of their own. What was begun in that of an HTTP request, Serve cancels when its client
    goes, also what gives back what it held; here each is given up by whoever made it.
    """

    def __init__(self, prefill: Any, decode: Any, silent_s: float = SILENT_S) -> None:
        """`silent_s`: a worker that says nothing for so long is lost."""
        # By gRPC. Where Ray carries a stream, whoever says it stands still at its end until the asker has all of it; an
        # ingress that froze kept its workers from every other call so, also from Serve's question how they are.
        self._prefill, self._decode = (handle.options(_by_reference=False) for handle in (prefill, decode))
        self._silent_s = silent_s
        self._heard: dict[str, _Heard] = {}
        self._prefill_stream, self._decode_stream = (h.options(stream=True) for h in (self._prefill, self._decode))
        self._relays: dict[str, Relay] = {}
        """Of each request whose prompt is computed on a worker of its own, until it is answered."""
        self._errands: set[asyncio.Task[None]] = set()
        self._lines = Lines()

    async def prefill(
        self, request: GenerationRequest, place: Place | None = None, answering: Place | None = None
    ) -> Prefilled | Failed:
        """While the prompt is computed, the worker that will answer fetches the pages that are there."""
        decode = self._at(answering, self._decode)
        relay = self._relays[request.request_id] = Relay(decode, request)
        handle = self._at(place, self._prefill_stream, stream=True)
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(_ASSIGN_TIMEOUT_S):
                    choice = handle.prefill_in_parts.choose_replica(request)
                    chosen = await stack.enter_async_context(choice)
                stream = Context().run(handle.dispatch, chosen, request)
                answer = await _heard(stream, relay, self._silent_s)
        except TimeoutError:
            return Failed(ClusterError(f"no prefill worker was free within {_ASSIGN_TIMEOUT_S:g} s"))
        except LOST as problem:
            return Failed(ClusterError(f"the prefill worker was lost: {type(problem).__name__}"))
        except ClusterError as problem:
            return Failed(problem)
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            return Failed(ClusterError("the call of the prefill worker was given up"))
        if isinstance(answer, Prefilled) and answer.ticket is None:
            # The answer is over with its first token: nobody will ask for the pages that were fetched.
            self._relays.pop(request.request_id, None)
            relay.end()
            if relay.has_told:
                self._send(decode, "cancel", request.request_id)
        return answer

    async def resume(
        self,
        request: GenerationRequest,
        answered: tuple[int, ...],
        ticket: KvTicket | None,
        place: Place | None = None,
    ) -> AsyncGenerator[StreamItem]:
        relay = self._relays.pop(request.request_id, None)
        told = None if relay is None else relay.settle()
        if told is not None:
            # Whoever was told of the pages has them; any other takes the call when it is gone.
            place = replace(place or Place("decode", told), worker=told)
        with self._riding(request.request_id, place) as (line, inbox):
            handle = self._at(place, self._decode_stream, stream=True)
            call = Context().run(handle.resume.remote, request, answered, ticket, line)
            said = _items(call, self._watch(lambda: self._is_lost(place)))
            async with aclosing(followed(said, inbox)) as items:
                async for item in items:
                    yield item

    @contextmanager
    def _riding(self, request_id: str, place: Place | None) -> Iterator[tuple[str, Inbox]]:
        """(name, inbox) of the line of a worker; where any may answer there is none."""
        if place is None:
            yield "", Inbox()
            return
        handle = self._at(place, None, stream=True)
        line = self._lines.of(place.worker, lambda name: handle.carry.remote(place.worker, name), self._watch())
        with line.rider(request_id) as inbox:
            yield line.name, inbox

    def reroute(self, request: GenerationRequest, *, begun: bool) -> bool:
        """Without a guide: whoever is free computes it where it decodes."""
        return False

    def release(self, ticket_id: str, place: Place | None = None) -> None:
        if place is None:
            self._send(self._prefill, "release", ticket_id)
        else:
            self._begin(_released(self._at(place, None), ticket_id))

    def cancel(self, request_id: str) -> None:
        if relay := self._relays.pop(request_id, None):
            relay.end()
        self._send(self._prefill, "cancel", request_id)
        self._send(self._decode, "cancel", request_id)

    async def info(self) -> list[WorkerInfo]:
        """What every worker says that answers in time; nothing where there is none at all.

        Raises ClusterError when there are some and none answers.
        """
        roles = (("prefill", self._prefill), ("decode", self._decode))
        told = await asyncio.gather(*(_told(handle, self._known(role)) for role, handle in roles))
        infos = [info for role in told if not isinstance(role, str) for info in role]
        silent = [why for why in told if isinstance(why, str)]
        if silent and not infos:
            raise ClusterError(f"no worker answers: {'; '.join(silent)}")
        return infos

    def _known(self, deployment: str) -> list[_Heard]:
        """Its workers that were heard of."""
        return [heard for heard in self._heard.values() if heard.deployment == deployment]

    async def reports(self, orders: Mapping[str, Orders], hear: Hear) -> set[str]:
        """Ask all workers how they stand, each told its orders; answers are told as they come. Those that are gone."""

        def heard(load: WorkerLoad, asked_at_s: float) -> None:
            self._note(load)
            hear(load, asked_at_s)

        roles = (("prefill", self._prefill), ("decode", self._decode))
        gone = await asyncio.gather(*(self._round(role, handle, orders, heard) for role, handle in roles))
        return set().union(*gone)

    async def _round(self, deployment: str, handle: Any, orders: Mapping[str, Orders], hear: Hear) -> set[str]:
        """One role is asked; its workers that were heard of before, and are no longer there."""
        asked_at_s = time.monotonic()
        if not await _reports(handle, orders, hear):
            return set()
        gone = {heard.worker for heard in self._known(deployment) if heard.at_s < asked_at_s}
        for worker in gone:
            del self._heard[worker]
        return gone

    async def wake(self, timeout_s: float) -> list[WorkerLoad]:
        """How a worker stands; where all were stopped, one is started by that. Nothing when none comes in time."""
        try:
            load: WorkerLoad = await asyncio.wait_for(_plain(self._decode.report.remote({})), timeout_s)
        except (TimeoutError, ClusterError, *LOST) as problem:
            logger.warning("no worker came: %s", type(problem).__name__)
            return []
        self._note(load)
        return [load]

    def _note(self, load: WorkerLoad) -> None:
        now_s = time.monotonic()
        self._heard = {worker: heard for worker, heard in self._heard.items() if now_s - heard.at_s < _REMEMBERED_S}
        self._heard[load.worker] = _Heard(load.worker, load.deployment, now_s)

    def _watch(self, is_lost: Callable[[], bool] | None = None) -> Watch:
        return Watch("the decode worker", self._silent_s, is_lost)

    def _is_lost(self, place: Place | None) -> bool:
        """Whether a worker is gone or says nothing any more, and there is another one to go to."""
        if place is None:
            return False
        since_s = time.monotonic() - self._silent_s
        fresh = {heard.worker for heard in self._heard.values() if heard.at_s >= since_s}
        return bool(fresh) and place.worker not in fresh

    def _at(self, place: Place | None, anybody: Any, *, stream: bool = False) -> Any:
        if place is None:
            return anybody
        handle = self._prefill if place.deployment == "prefill" else self._decode
        return handle.options(session_id=place.worker, stream=stream)

    def _send(self, handle: Any, method: str, argument: str) -> None:
        # To all replicas: which one holds the request or the ticket is their business, and repeating is harmless.
        self._begin(_delivered(handle, method, argument))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        errand = asyncio.get_running_loop().create_task(work, context=Context())
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)


async def _heard(stream: Any, relay: Relay, silent_s: float) -> Prefilled | Failed:
    """What a prefill worker says in the end; what it offers on the way is passed on."""
    answer: Prefilled | Failed = Failed(ClusterError("the prefill worker ended without an answer"))
    over = False
    try:
        async for item in unless_silent(stream, Watch("the prefill worker", silent_s)):
            if isinstance(item, KvOffer):
                relay.tell(item)
            else:
                answer = item
        over = True
    finally:
        if not over:
            stream.cancel()
    return answer


async def _items(stream: Any, watch: Watch) -> AsyncGenerator[StreamItem | Elsewhere]:
    """What a decode worker says, and that it was lost, if it was."""
    over = False
    try:
        async with aclosing(unless_silent(stream, watch)) as items:
            async for item in items:
                yield item
        over = True
    except LOST as problem:
        over = True
        yield Failed(ClusterError(f"{watch.whom} was lost: {type(problem).__name__}"))
    except ClusterError as problem:
        # It is told to stop before anybody else begins.
        stream.cancel()
        over = True
        yield Failed(problem)
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        over = True
        yield Failed(ClusterError(f"the call of {watch.whom} was given up"))
    finally:
        if not over:
            stream.cancel()


async def _reports(handle: Any, orders: Mapping[str, Orders], hear: Hear) -> bool:
    """How the workers of a deployment stand; whether all that there are have answered."""
    asked_at_s = time.monotonic()
    try:
        call = handle.broadcast("report", orders)
        told = await _plain(call.results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True))
    except RayServeException:
        # None of the role is there.
        return True
    except (ClusterError, *LOST):
        return False
    except TimeoutError:
        # One of them hangs, and with it the answers of all: they are asked one by one, and none waits for another.
        await asyncio.gather(*(_standing(handle, name, orders[name], hear) for name in orders))
        return False
    for load in told:
        if isinstance(load, WorkerLoad):
            hear(load, asked_at_s)
    return True


async def _standing(handle: Any, worker: str, orders: Orders, hear: Hear) -> None:
    """How one worker stands; another answers in its place where it is gone."""
    asked_at_s = time.monotonic()
    call = handle.options(session_id=worker).report.remote({worker: orders})
    try:
        load: WorkerLoad = await asyncio.wait_for(_plain(call), _REPORT_TIMEOUT_S)
    except (TimeoutError, ClusterError, *LOST):
        return
    hear(load, asked_at_s)


async def _told(handle: Any, known: Sequence[_Heard]) -> list[WorkerInfo] | str:
    """What the workers of a role say of themselves, nothing where there is none; or why none of them says anything."""
    try:
        # To all: a call to any would wait for one where there is none.
        call = handle.broadcast("info")
        told = await _plain(call.results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True))
    except DeploymentUnavailableError:
        return []
    except TimeoutError:
        told = await _told_alone(handle, known)
    except (ClusterError, *LOST) as problem:
        return str(problem) if isinstance(problem, ClusterError) else type(problem).__name__
    infos = [info for info in told if isinstance(info, WorkerInfo)]
    return infos if infos or not told else "; ".join(str(problem) for problem in told)


async def _told_alone(handle: Any, known: Sequence[_Heard]) -> list[WorkerInfo | str]:
    """The same of a role of which one worker hangs: none waits for another."""
    if not known:
        return [await _info(handle, _CONTROL_TIMEOUT_S)]
    calls = (_info(handle.options(session_id=heard.worker), _REPORT_TIMEOUT_S) for heard in known)
    told = await asyncio.gather(*calls)
    # Where one is gone another answers in its place, and is not there twice.
    return list({one if isinstance(one, str) else one.worker: one for one in told}.values())


async def _info(handle: Any, within_s: float) -> WorkerInfo | str:
    try:
        info: WorkerInfo = await asyncio.wait_for(_plain(handle.info.remote()), within_s)
    except (TimeoutError, ClusterError, *LOST) as problem:
        return str(problem) if isinstance(problem, ClusterError) else type(problem).__name__
    return info


async def _plain(response: Any) -> Any:
    """What a call gives; one that was given up elsewhere is an error like any other."""
    try:
        return await response
    except asyncio.CancelledError:
        if being_cancelled():
            raise
        raise ClusterError("a call of a worker was given up") from None


async def _released(worker: Any, ticket_id: str) -> None:
    """Tell the one worker that handed a ticket out; of one that is gone, nobody has it."""
    try:
        await asyncio.wait_for(_plain(worker.release.remote(ticket_id)), _CONTROL_TIMEOUT_S)
    except (TimeoutError, ClusterError, *LOST) as problem:
        # A lease ends by itself.
        logger.warning("a ticket was not given back: %s", type(problem).__name__)


async def _delivered(handle: Any, method: str, argument: str) -> None:
    try:
        await asyncio.wait_for(handle.broadcast(method, argument).results_async(), _CONTROL_TIMEOUT_S)
    except (TimeoutError, *LOST) as problem:
        # A lease ends by itself and a dead worker holds nothing.
        logger.warning("%s was not delivered: %s", method, type(problem).__name__)
