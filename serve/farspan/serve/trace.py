"""What happened to one request, in numbers."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from farspan.serve.policy import Route

_KEPT_REQUESTS = 1000
# Further answers of one request count too: each has gaps of its own.
_KEPT_ANSWERS = 4000
# Times between tokens, by powers of this: a percentile is right to 5 %, however long the answer was.
_STEP = 1.1
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHORTEST_GAP_S, _LONGEST_GAP_S = 1e-4, 1e4


def request_name(given: str) -> str:
    """By which a request is traced: what its client gave, where that is plain, or else a new one."""
    return given if _PLAIN_NAME.fullmatch(given) else uuid.uuid4().hex


@dataclass(slots=True)
class Arrivals:
    """When tokens were there, in seconds since the start: as much room for a million of them as for a hundred."""

    count: int = 0
    first_s: float | None = None
    last_s: float | None = None
    gaps: Counter[int] = field(default_factory=Counter)
    """How many gaps lay between two powers of the step; 0: shorter than can be told from none."""

    def add(self, count: int, at_s: float) -> None:
        """Tokens that came together share the time since those before them: they were kept for each other."""
        if count == 0:
            return
        if self.last_s is None:
            self.first_s = at_s
            self.gaps[0] += count - 1
        else:
            self.gaps[_bucket((at_s - self.last_s) / count)] += count
        self.count, self.last_s = self.count + count, at_s

    @property
    def span_s(self) -> float:
        """From the first token to the last: all gaps together."""
        return 0.0 if self.first_s is None or self.last_s is None else self.last_s - self.first_s

    def lengths(self) -> Iterator[tuple[float, int]]:
        """(seconds, how many gaps of that length)."""
        for bucket, count in self.gaps.items():
            yield _gap_s(bucket), count

    def percentile_s(self, percent: int) -> float | None:
        """Of the gaps; none before there are two tokens."""
        wanted, seen = self.gaps.total() * percent // 100, 0
        for bucket in sorted(self.gaps):
            seen += self.gaps[bucket]
            if seen > wanted:
                return _gap_s(bucket)
        return None


@dataclass(slots=True)
class Tally:
    """The answers of all requests that are kept."""

    count: int = 0


@dataclass(slots=True)
class RequestTrace:
    """Filled while the request is answered. Seconds unless the name says otherwise."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found where it was computed."""
    route: str = ""
    route_reason: str = ""
    prefill_worker: str | None = None
    """Which worker was chosen for the prompt, where it is another one than for the answer."""
    decode_worker: str | None = None
    predicted_first_token_s: float | None = None
    predicted_token_s: float | None = None
    """What its way was chosen for."""
    started_s: float = field(default_factory=time.monotonic)
    asked_s: float | None = None
    """From arrival until a worker was asked."""
    queue_s: float | None = None
    """From arrival until an engine took the prompt up: what was waited in the ingress, on the way and in the worker."""
    prefill_s: float | None = None
    """From then until the first token, where another worker than that of the answer computed the prompt."""
    transport: str = "none"
    kv_pages: int = 0
    kv_bytes: int = 0
    kv_pages_early: int = 0
    """Pages that were fetched, or under way, while the prompt was still computed."""
    kv_digest: str = ""
    """Of what all those pages hold, as it was offered and found again where they arrived; empty: none travelled."""
    page_wait_s: float = 0.0
    """What was waited for free pages where it decodes, before the first page was asked for."""
    transfer_s: float = 0.0
    """What was waited for the pages after that."""
    pulled_s: float | None = None
    """From arrival until the pages were there."""
    recovered: bool = False
    recoveries: list[str] = field(default_factory=list)
    """Why the answer had to go on in another way, in order."""
    finish: str | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    others: list[RequestTrace] = field(default_factory=list)
    """Further answers to the same request."""
    tally: Tally | None = None
    """Where its answers are counted, while it is kept."""

    def choice(self, number: int) -> RequestTrace:
        """Where the answer of this number is noted; called once for each, in order."""
        if number == 0:
            return self
        if self.tally is not None:
            self.tally.count += 1
        self.others.append(RequestTrace(f"{self.request_id}/{number}", self.prompt_tokens, started_s=self.started_s))
        return self.others[-1]

    def note(self, route: Route) -> None:
        """The way that was chosen."""
        self.prefill_worker = None if route.prefill is None else route.prefill.worker
        self.decode_worker = None if route.decode is None else route.decode.worker
        self.predicted_first_token_s, self.predicted_token_s = route.first_s, route.token_s

    def token(self, count: int) -> None:
        self.arrivals.add(count, time.monotonic() - self.started_s)

    @property
    def age_s(self) -> float:
        """Since arrival."""
        return time.monotonic() - self.started_s

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        arrivals = self.arrivals
        names = ("request_id", "prompt_tokens", "cached_tokens", "route", "route_reason", "queue_s", "prefill_s")
        chosen = ("prefill_worker", "decode_worker", "predicted_first_token_s", "predicted_token_s")
        more = (
            "transport",
            "kv_pages",
            "kv_bytes",
            "kv_pages_early",
            "kv_digest",
            "page_wait_s",
            "transfer_s",
            "recovered",
            "recoveries",
            "finish",
        )
        return {
            **{name: getattr(self, name) for name in (*names, *chosen, *more)},
            "output_tokens": arrivals.count,
            "time_to_first_token_s": arrivals.first_s,
            "total_s": arrivals.last_s,
            "inter_token_latency_s": {f"p{p}": arrivals.percentile_s(p) for p in (50, 90, 99)},
            **({"other_choices": [other.report() for other in self.others]} if self.others else {}),
        }


class TraceBook:
    """The traces of the latest requests; older ones are forgotten."""

    def __init__(self) -> None:
        self._traces: OrderedDict[tuple[str, str], RequestTrace] = OrderedDict()
        self._tally = Tally()

    def open(
        self, request_id: str, prompt_tokens: int, tenant: str = "", started_s: float | None = None
    ) -> RequestTrace:
        """Clients may choose ids: those of one tenant are not those of another. `started_s`: monotonic; none: now."""
        trace = RequestTrace(request_id, prompt_tokens, started_s=time.monotonic() if started_s is None else started_s)
        self._forget((tenant, request_id))
        self._traces[tenant, request_id] = trace
        # How many answers it will have is known later: they make room when the next one is opened.
        trace.tally, self._tally.count = self._tally, self._tally.count + 1
        while len(self._traces) > 1 and (len(self._traces) > _KEPT_REQUESTS or self._tally.count > _KEPT_ANSWERS):
            self._forget(next(iter(self._traces)))
        return trace

    def find(self, request_id: str, tenant: str = "") -> RequestTrace | None:
        """By the id of the header, or by the id of the answer."""
        bare = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        return self._traces.get((tenant, request_id)) or self._traces.get((tenant, bare))

    def _forget(self, name: tuple[str, str]) -> None:
        if (trace := self._traces.pop(name, None)) is not None:
            trace.tally, self._tally.count = None, self._tally.count - 1 - len(trace.others)


def _bucket(gap_s: float) -> int:
    if gap_s < _SHORTEST_GAP_S:
        return 0
    return 1 + math.floor(math.log(min(gap_s, _LONGEST_GAP_S) / _SHORTEST_GAP_S, _STEP))


def _gap_s(bucket: int) -> float:
    """The middle of a bucket."""
    return 0.0 if bucket == 0 else float(_SHORTEST_GAP_S * _STEP ** (bucket - 0.5))
