"""What the ingress counts, for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily

from farspan.engine.draft import NO_GUESSES, DraftUse
from farspan.errors import RequestError
from farspan.serve.messages import WorkerInfo
from farspan.serve.reply import Counted
from farspan.serve.shape import ApiError
from farspan.serve.trace import Arrivals, RequestTrace

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TRANSFER_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
# More workers than an endpoint has at a time: one that says nothing for a while is not counted anew.
_MOST_WORKERS = 1024


class Metrics:
    """Numbers of one ingress, in a registry of its own."""

    def __init__(self) -> None:
        self.num_open = 0
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("farspan_requests", "Requests that ended, by how.", ["outcome"], registry=registry)
        self._running = Gauge("farspan_requests_running", "Requests being answered.", registry=registry)
        self._tokens = Counter(
            "farspan_request_tokens", "Tokens: of prompts, found of them, of answers.", ["kind"], registry=registry
        )
        self._drafted = Counter(
            "farspan_draft_tokens",
            "Tokens that workers guessed ahead: proposed, and accepted of those.",
            ["kind"],
            registry=registry,
        )
        self._told: OrderedDict[tuple[str, int], DraftUse] = OrderedDict()
        """Of each worker, by replica and process, what it said of its guesses last."""
        self._recoveries = Counter(
            "farspan_recoveries", "Failures of workers that no client noticed.", registry=registry
        )
        self._first = Histogram(
            "farspan_time_to_first_token_seconds", "From arrival.", buckets=_FIRST_TOKEN_S, registry=registry
        )
        self._whole = Histogram("farspan_request_seconds", "From arrival.", buckets=_WHOLE_S, registry=registry)
        self._gaps = Gaps(
            "farspan_inter_token_seconds",
            "Between two tokens of an answer; those that come together share the time.",
            registry,
        )
        self._moved = Counter(
            "farspan_transfer_bytes", "KV pages sent, prefill to decode.", ["transport"], registry=registry
        )
        self._awaited = Histogram(
            "farspan_transfer_seconds",
            "From the first KV page asked for to the last that arrived.",
            ["transport"],
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._room = Histogram(
            "farspan_transfer_room_seconds",
            "What transfers waited for free KV pages, before the first was asked for.",
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._pages = Gauge("farspan_kv_pages", "Of all workers of a role.", ["role", "state"], registry=registry)
        self._host = Gauge(
            "farspan_host_cache_pages",
            "Of all workers of a role, since each started.",
            ["role", "what"],
            registry=registry,
        )
        self._open = Gauge("farspan_worker_requests", "In all workers of a role.", ["role"], registry=registry)

    def names(self) -> list[tuple[str, str, str]]:
        """(name, kind, meaning) of every number."""
        return [(family.name, family.type, family.documentation) for family in self._registry.collect()]

    @contextmanager
    def request(self, trace: RequestTrace, counted: Counted) -> Iterator[None]:
        """Count one request, however it ends."""
        self._running.inc()
        self.num_open += 1
        outcome = "abandoned"
        try:
            yield
            outcome = "answered"
        except Exception as problem:
            outcome = _outcome(problem)
            raise
        finally:
            self._running.dec()
            self.num_open -= 1
            self._requests.labels(outcome).inc()
            self._measure(trace, counted)

    def families(self, infos: Sequence[WorkerInfo]) -> list[Metric]:
        """Every number, with those of the workers as they say them now."""
        for gauge in (self._pages, self._host, self._open):
            # Nothing stays of workers that are gone.
            gauge.clear()
        for info in infos:
            states = {"all": info.num_pages, "free": info.num_free, "quarantined": info.num_quarantined}
            states["forgotten"] = info.num_forgotten
            for state, count in states.items():
                self._pages.labels(info.role, state).inc(count)
            for what, count in ({} if info.host is None else asdict(info.host)).items():
                self._host.labels(info.role, what).inc(count)
            self._open.labels(info.role).inc(info.num_requests)
            self._count_guesses(info)
        return list(self._registry.collect())

    def _count_guesses(self, info: WorkerInfo) -> None:
        """What is new since a worker was asked last; what was guessed by those that are gone stays counted."""
        name = (info.worker, info.pid)
        before = self._told.get(name, NO_GUESSES)
        # Questions overlap: an older answer may come later.
        told = info.drafted if info.drafted.proposed > before.proposed else before
        new = told.since(before)
        self._drafted.labels("proposed").inc(new.proposed)
        self._drafted.labels("accepted").inc(new.accepted)
        self._told[name] = told
        self._told.move_to_end(name)
        while len(self._told) > _MOST_WORKERS:
            self._told.popitem(last=False)

    def _measure(self, trace: RequestTrace, counted: Counted) -> None:
        kinds = {"prompt": counted.prompt_tokens, "answer": counted.answer_tokens, "cached": counted.cached_tokens}
        for kind, count in kinds.items():
            self._tokens.labels(kind).inc(count)
        self._recoveries.inc(sum(len(one.recoveries) for one in (trace, *trace.others)))
        for one in (trace, *trace.others):
            self._gaps.add(one.arrivals)
            if one.kv_pages:
                self._moved.labels(one.transport).inc(one.kv_bytes)
                self._room.observe(one.page_wait_s)
                self._awaited.labels(one.transport).observe(one.transfer_s)
        if trace.arrivals.first_s is not None:
            self._first.observe(trace.arrivals.first_s)
            self._whole.observe(time.monotonic() - trace.started_s)


class Gaps:
    """A histogram that takes the times between all tokens of an answer at once: one by one they would cost more than
    the answer's events. Right to 5 %, as they are kept; their sum is exact.
    """

    def __init__(self, name: str, meaning: str, registry: CollectorRegistry) -> None:
        self._name, self._meaning = name, meaning
        self._counts, self._sum_s = [0] * (len(_GAP_S) + 1), 0.0
        registry.register(self)

    def add(self, arrivals: Arrivals) -> None:
        """The gaps of one answer that is over."""
        for seconds, count in arrivals.lengths():
            self._counts[bisect_left(_GAP_S, seconds)] += count
        self._sum_s += arrivals.span_s

    def collect(self) -> list[Metric]:
        """As a registry of Prometheus asks for it."""
        bounds = [*map(str, map(float, _GAP_S)), "+Inf"]
        family = HistogramMetricFamily(self._name, self._meaning)
        family.add_metric([], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum_s)
        return [family]


class _Collected:
    """What `generate_latest` asks of a registry."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def rendered(families: Sequence[Metric]) -> bytes:
    """The text Prometheus reads."""
    return generate_latest(_Collected(families))


def by_model(measured: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """The numbers of several models as one list, each sample with the name of its model."""
    merged: dict[str, Metric] = {}
    for model, families in measured.items():
        for family in families:
            whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {"model": model, **sample.labels}, sample.value)
    return list(merged.values())


def _outcome(problem: Exception) -> str:
    if isinstance(problem, ApiError):
        return {429: "limited", 504: "late"}.get(problem.status, "refused")
    return "refused" if isinstance(problem, RequestError) else "failed"
