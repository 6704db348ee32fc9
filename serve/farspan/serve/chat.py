"""What happens to one request, from prompt to last word."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from farspan.engine.detokenize import Detokenizer, StopStrings
from farspan.errors import ClusterError, FarspanError, RequestError
from farspan.kv.ticket import KvTicket
from farspan.serve.messages import Failed, GenerationRequest, Pulled, Tokens
from farspan.serve.policy import Route
from farspan.serve.router import Workers
from farspan.serve.trace import RequestTrace
from farspan.serve.wire import ApiError, ChatMessage

# One transfer may fail, and one worker may die, without the client noticing.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of text; `finish` is set on the last one."""

    text: str
    finish: str | None
    num_tokens: int
    """Tokens of the answer so far."""


async def answer(
    request: GenerationRequest,
    route: Route,
    workers: Workers,
    detokenizer: Detokenizer,
    stops: StopStrings,
    trace: RequestTrace,
) -> AsyncGenerator[Delta]:
    """One answer, in the order it happens.

    Raises:
        RequestError: it can never be answered.
        FarspanError: the workers failed more often than we try.
    """
    num_tokens = 0
    finished = False
    try:
        async with aclosing(answer_tokens(request, route, workers, trace)) as batches:
            async for batch in batches:
                num_tokens += len(batch.tokens)
                trace.token(len(batch.tokens))
                text, finish = _text_of(batch, detokenizer, stops)
                finished, trace.finish = batch.finish is not None, finish
                yield Delta(text, finish, num_tokens)
                if finish is not None:
                    return
    finally:
        if not finished:
            # A stop string, or a client that went away: the workers must not go on.
            workers.cancel(request.request_id)


def _text_of(batch: Tokens, detokenizer: Detokenizer, stops: StopStrings) -> tuple[str, str | None]:
    """(text, finish) of the next tokens: a stop string ends the answer before the tokens do."""
    text = stops.push(detokenizer.push(batch.tokens))
    if batch.finish is not None:
        text += stops.push(detokenizer.finish())
        text += stops.finish()
    return text, "stop" if stops.stopped else batch.finish


async def answer_tokens(
    request: GenerationRequest, route: Route, workers: Workers, trace: RequestTrace
) -> AsyncGenerator[Tokens]:
    """The tokens of the answer. Whatever fails on the way, the answer goes on after the last token that was given."""
    trace.route, trace.route_reason = "split" if route.split else "colocated", route.reason
    answered: tuple[int, ...] = ()
    ticket: KvTicket | None = None
    first: Tokens | None = None
    if route.split:
        prefilled = await workers.prefill(request)
        if isinstance(prefilled, Failed):
            _recover(trace, prefilled.error)
        else:
            first = Tokens((prefilled.token,), prefilled.finish)
            ticket, trace.prefill_s = prefilled.ticket, prefilled.seconds
    try:
        if first is not None:
            answered = first.tokens
            yield first
            if first.finish is not None:
                return
        for attempt in range(_ATTEMPTS):
            # Pages are fetched once; every further attempt computes them where it decodes.
            fetched = ticket if attempt == 0 else None
            async with aclosing(workers.resume(request, answered, fetched)) as items:
                async for item in items:
                    if isinstance(item, Failed):
                        _recover(trace, item.error)
                        if attempt + 1 == _ATTEMPTS:
                            raise item.error
                        break
                    if ticket is not None:
                        # Anything that is not a failure means that the offered pages are not needed any more.
                        workers.release(ticket.ticket_id)
                        ticket = None
                    if isinstance(item, Pulled):
                        _note(trace, item)
                        continue
                    answered += item.tokens
                    yield item
                    if item.finish is not None:
                        return
        raise ClusterError(f"request {request.request_id}: the decode worker ended without an answer")
    finally:
        if ticket is not None:
            workers.release(ticket.ticket_id)


def _recover(trace: RequestTrace, error: FarspanError) -> None:
    """Remember a failure that another attempt can mend; a request nobody could answer fails here."""
    if isinstance(error, RequestError):
        raise error
    trace.recovered = True
    trace.recoveries.append(str(error))


def _note(trace: RequestTrace, pulled: Pulled) -> None:
    trace.transport, trace.transfer_s = pulled.transport, pulled.seconds
    trace.kv_pages, trace.kv_bytes = pulled.num_pages, pulled.num_bytes


def chat_prompt(tokenizer: Any, messages: list[ChatMessage]) -> list[int]:
    """The tokens of a conversation, by the model's own chat template. Raises ApiError when it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(
            400,
            "messages: this model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    words = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)
    # Templates are jinja programs of the model's author: any error in one is about these messages.
    except Exception as problem:
        raise ApiError(400, f"messages: the chat template refuses them: {problem}", param="messages") from None
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
