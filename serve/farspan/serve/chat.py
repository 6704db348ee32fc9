"""What happens to one request, from prompt to last word."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from farspan.engine.detokenize import AnswerText
from farspan.engine.request import TokenLogprobs
from farspan.errors import ClusterError, FarspanError, RequestError, TransferError
from farspan.kv.ticket import KvTicket
from farspan.serve.messages import Failed, GenerationRequest, Prefilled, Pulled, Tokens
from farspan.serve.policy import Route
from farspan.serve.router import Workers
from farspan.serve.trace import RequestTrace

# Transfers fail and workers die without the client noticing, until so many attempts in a row brought no token.
_ATTEMPTS = 3
# Of those, prompts that are computed on a worker of their own: the last way depends on one worker alone.
_PREFILLS = 2


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of text; `finish` is set on the last one."""

    text: str
    finish: str | None
    num_tokens: int
    """Tokens of the answer so far."""
    tokens: tuple[int, ...] = ()
    """Those that came with this piece; their text may come later."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()
    """Where the text of each token begins in the answer, if logprobs are told."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int = 0
    stop: str | None = None
    """With the last one: the stop string that ended the answer."""
    index: int = 0
    """Which answer of the request it belongs to."""


async def answer(
    request: GenerationRequest,
    route: Route,
    workers: Workers,
    text: AnswerText,
    trace: RequestTrace,
) -> AsyncGenerator[Delta]:
    """One answer, in the order it happens.

    Raises:
        RequestError: it can never be answered.
        FarspanError: the workers failed more often in a row than we try.
    """
    num_tokens = 0
    async with aclosing(answer_tokens(request, route, workers, trace)) as batches:
        async for batch in batches:
            words = text.push(batch.tokens, batch.finish)
            count = words.num_tokens
            num_tokens += count
            if num_tokens == count:
                # Whatever it was not computed, it waited: also in queues that say nothing of it, as Serve's.
                trace.cached_tokens, trace.queue_s = batch.num_cached, max(0.0, trace.age_s - batch.computed_s)
            trace.token(count)
            trace.finish = words.finish
            yield Delta(
                words.text,
                words.finish,
                num_tokens,
                batch.tokens[:count],
                batch.logprobs[:count],
                words.offsets,
                batch.prompt_logprobs,
                batch.num_cached,
                words.stop,
            )
            if words.finish is not None:
                return


async def answer_tokens(
    request: GenerationRequest, route: Route, workers: Workers, trace: RequestTrace
) -> AsyncGenerator[Tokens]:
    """The tokens of the answer. Whatever fails on the way, the answer goes on after the last token that was given."""
    trace.route, trace.route_reason = "split" if route.split else "colocated", route.reason
    trace.asked_s = trace.age_s
    answered: tuple[int, ...] = ()
    ticket: KvTicket | None = None
    asking = _Asking(request, workers, trace)
    split, prefills, attempts = route.split, 0, 0
    try:
        while True:
            if split and prefills < _PREFILLS:
                prefills += 1
                prefilled = await workers.prefill(asking.now)
                if isinstance(prefilled, Failed):
                    split = asking.again(prefilled.error, begun=bool(answered))
                    continue
                ticket = prefilled.ticket
                if not answered:
                    trace.prefill_s, answered = prefilled.seconds, (prefilled.token,)
                    asking.over = prefilled.finish is not None
                    yield _first_token(prefilled)
                    if asking.over:
                        return
            attempts += 1
            problem: FarspanError = ClusterError("the decode worker ended without an answer")
            async with aclosing(workers.resume(asking.now, answered, ticket)) as items:
                async for item in items:
                    if isinstance(item, Failed):
                        problem = item.error
                        break
                    if ticket is not None:
                        # Anything that is not a failure means that the offered pages are not needed any more.
                        workers.release(ticket.ticket_id)
                        ticket = None
                    if isinstance(item, Pulled):
                        _note(trace, item)
                        continue
                    answered, attempts, prefills = answered + item.tokens, 0, 0
                    asking.over = item.finish is not None
                    yield item
                    if asking.over:
                        return
            if ticket is not None:
                # They stay cached there, for whoever computes the prompt again.
                workers.release(ticket.ticket_id)
                ticket = None
            asking.over = attempts == _ATTEMPTS
            split = asking.again(problem, begun=bool(answered))
            if asking.over:
                raise problem
    finally:
        if ticket is not None:
            workers.release(ticket.ticket_id)
        asking.end()


class _Asking:
    """Under which name the workers are asked: another one whenever a worker was lost.

    One that was only believed to be lost can then be told to stop, and takes no attempt for another.
    """

    def __init__(self, request: GenerationRequest, workers: Workers, trace: RequestTrace) -> None:
        self.now, self._request, self._workers, self._trace = request, request, workers, trace
        self._failures, self.over = 0, False

    def again(self, error: FarspanError, *, begun: bool) -> bool:
        """Choose another way after a failure that one can mend; a request nobody could answer fails here.

        Whether its prompt is computed on a worker of its own next. `begun`: something was said already.
        """
        if isinstance(error, RequestError):
            raise error
        self._trace.recovered = True
        self._trace.recoveries.append(str(error))
        if isinstance(error, TransferError):
            # Nobody is lost, and pages that go the same way again may fail again: it is computed where it decodes.
            return False
        # It may live on, behind a connection that broke, or wake.
        self._workers.cancel(self.now.request_id)
        self._failures += 1
        self.now = replace(self._request, request_id=f"{self._request.request_id}~{self._failures}")
        return self._workers.reroute(self.now, begun=begun)

    def end(self) -> None:
        """A stop string, or a client that went away: the workers must not go on."""
        if not self.over:
            self._workers.cancel(self.now.request_id)


def _first_token(prefilled: Prefilled) -> Tokens:
    logprobs = () if prefilled.logprobs is None else (prefilled.logprobs,)
    return Tokens(
        (prefilled.token,),
        prefilled.finish,
        logprobs,
        prefilled.prompt_logprobs,
        prefilled.num_cached,
        prefilled.seconds,
    )


def _note(trace: RequestTrace, pulled: Pulled) -> None:
    trace.transport, trace.page_wait_s, trace.transfer_s = pulled.transport, pulled.room_s, pulled.seconds
    trace.kv_pages, trace.kv_bytes, trace.kv_pages_early = pulled.num_pages, pulled.num_bytes, pulled.num_early
    trace.kv_digest, trace.pulled_s = pulled.digest, trace.age_s
