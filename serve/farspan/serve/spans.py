"""Spans of OpenTelemetry for what a request took, below the span of whoever asked.

They are made when a request is over, from its trace: nothing is added to a token on its way. No text of a prompt or an
answer, no key, and no name a client made up is in them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TypeVar

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import NoOpTracerProvider, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from farspan.serve.reply import Counted
from farspan.serve.trace import RequestTrace

Value = TypeVar("Value")

_PARENT_HEADERS = ("traceparent", "tracestate")


def exporter_to(endpoint: str) -> SpanExporter:
    """Sends spans to a collector by OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")


class Spans:
    """Of one ingress. Its provider is its own: nothing of the process is changed."""

    def __init__(self, exporter: SpanExporter | None) -> None:
        """Without an exporter nothing is made."""
        self._provider: TracerProvider | None = None
        if exporter is not None:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": "farspan"}), shutdown_on_exit=False
            )
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = (self._provider or NoOpTracerProvider()).get_tracer("farspan.serve")

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()

    def told(
        self,
        steps: AsyncGenerator[Value],
        route: str,
        headers: Mapping[str, str],
        model: str,
        trace: RequestTrace,
        counted: Counted,
    ) -> AsyncGenerator[Value]:
        """The same steps; when they are over, the spans of their request are made."""
        if self._provider is None:
            return steps
        parent = {name: headers[name] for name in _PARENT_HEADERS if name in headers}
        return self._told(steps, route, parent, model, trace, counted)

    async def _told(
        self,
        steps: AsyncGenerator[Value],
        route: str,
        parent: Mapping[str, str],
        model: str,
        trace: RequestTrace,
        counted: Counted,
    ) -> AsyncGenerator[Value]:
        problem: BaseException | None = None
        try:
            async with aclosing(steps):
                async for step in steps:
                    yield step
        except BaseException as raised:
            problem = raised
            raise
        finally:
            self._record(route, parent, model, trace, counted, problem)

    def _record(
        self,
        route: str,
        parent: Mapping[str, str],
        model: str,
        trace: RequestTrace,
        counted: Counted,
        problem: BaseException | None,
    ) -> None:
        clock = _Clock()
        root = self._tracer.start_span(
            f"POST {route}",
            context=TraceContextTextMapPropagator().extract(parent),
            kind=SpanKind.SERVER,
            start_time=clock.ns(trace.started_s),
            attributes=_attributes(route, model, trace, counted),
        )
        for number, choice in enumerate((trace, *trace.others)):
            self._record_phases(root, clock, number, choice)
        if isinstance(problem, Exception):
            # Its sentence may repeat what a client wrote; its kind does not.
            root.set_status(Status(StatusCode.ERROR, type(problem).__name__))
        elif problem is not None:
            root.set_attribute("farspan.client_left", True)
        root.end(clock.ns(time.monotonic()))

    def _record_phases(self, root: Span, clock: _Clock, number: int, choice: RequestTrace) -> None:
        for name, begin_s, end_s in phases(choice):
            span = self._tracer.start_span(
                name,
                context=set_span_in_context(root),
                start_time=clock.ns(choice.started_s + begin_s),
                attributes={"farspan.choice": number, **_of_phase(name, choice)},
            )
            span.end(clock.ns(choice.started_s + end_s))


class _Clock:
    """From this process's monotonic seconds to the nanoseconds of the wall."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def ns(self, at_s: float) -> int:
        return int((at_s + self._offset_s) * 1e9)


def phases(choice: RequestTrace) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what happened to one answer, in seconds from its arrival.

    queue: until an engine took the prompt up, or, where none did, until a worker was asked. prefill: until the first
    token. room: while there were no free pages to fetch into, if that was so. transfer: while pages were waited for.
    decode: until the last token.
    """
    taken, arrivals = choice.asked_s if choice.queue_s is None else choice.queue_s, choice.arrivals
    found = [("queue", 0.0, choice.age_s if taken is None else taken)]
    if taken is None or arrivals.first_s is None or arrivals.last_s is None:
        return found
    found.append(("prefill", taken, arrivals.first_s))
    if choice.pulled_s is not None:
        began_s = max(0.0, choice.pulled_s - choice.transfer_s)
        if choice.page_wait_s:
            found.append(("room", max(0.0, began_s - choice.page_wait_s), began_s))
        found.append(("transfer", began_s, choice.pulled_s))
    return [*found, ("decode", arrivals.first_s, arrivals.last_s)]


def _attributes(route: str, model: str, trace: RequestTrace, counted: Counted) -> dict[str, AttributeValue]:
    finishes = [one.finish for one in (trace, *trace.others) if one.finish is not None]
    return {
        "http.request.method": "POST",
        "http.route": route,
        "gen_ai.operation.name": "chat" if counted.style.chat else "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": counted.prompt_tokens,
        "gen_ai.usage.output_tokens": counted.answer_tokens,
        "gen_ai.response.finish_reasons": finishes,
        "farspan.cached_tokens": counted.cached_tokens,
        "farspan.route": trace.route,
        "farspan.recoveries": sum(len(one.recoveries) for one in (trace, *trace.others)),
    }


def _of_phase(name: str, choice: RequestTrace) -> dict[str, AttributeValue]:
    if name == "transfer":
        return {"farspan.kv_bytes": choice.kv_bytes, "farspan.transport": choice.transport}
    return {"farspan.tokens": choice.arrivals.count} if name == "decode" else {}
