"""What happened to one request, in numbers."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

_KEPT_REQUESTS = 1000


@dataclass(slots=True)
class RequestTrace:
    """Filled while the request is answered. Seconds unless the name says otherwise."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found where it was computed."""
    route: str = ""
    route_reason: str = ""
    started_s: float = field(default_factory=time.monotonic)
    prefill_s: float | None = None
    transport: str = "none"
    kv_pages: int = 0
    kv_bytes: int = 0
    transfer_s: float = 0.0
    recovered: bool = False
    recoveries: list[str] = field(default_factory=list)
    """Why the answer had to go on in another way, in order."""
    finish: str | None = None
    arrivals_s: list[float] = field(default_factory=list)
    """When each token was there, since the start."""
    others: list[RequestTrace] = field(default_factory=list)
    """Further answers to the same request."""

    def choice(self, number: int) -> RequestTrace:
        """Where the answer of this number is noted; called once for each, in order."""
        if number == 0:
            return self
        self.others.append(RequestTrace(f"{self.request_id}/{number}", self.prompt_tokens))
        return self.others[-1]

    def token(self, count: int) -> None:
        self.arrivals_s += [time.monotonic() - self.started_s] * count

    def report(self) -> dict[str, Any]:
        """Plain values for JSON."""
        arrivals = self.arrivals_s
        gaps = sorted(b - a for a, b in itertools.pairwise(arrivals))
        names = ("request_id", "prompt_tokens", "cached_tokens", "route", "route_reason", "prefill_s", "transport")
        more = ("kv_pages", "kv_bytes", "transfer_s", "recovered", "recoveries", "finish")
        return {
            **{name: getattr(self, name) for name in (*names, *more)},
            "output_tokens": len(arrivals),
            "time_to_first_token_s": arrivals[0] if arrivals else None,
            "total_s": arrivals[-1] if arrivals else None,
            "inter_token_latency_s": {f"p{p}": _percentile(gaps, p) for p in (50, 90, 99)},
            **({"other_choices": [other.report() for other in self.others]} if self.others else {}),
        }


class TraceBook:
    """The traces of the latest requests; older ones are forgotten."""

    def __init__(self) -> None:
        self._traces: OrderedDict[tuple[str, str], RequestTrace] = OrderedDict()

    def open(self, request_id: str, prompt_tokens: int, tenant: str = "") -> RequestTrace:
        """Clients may choose ids: those of one tenant are not those of another."""
        trace = RequestTrace(request_id, prompt_tokens)
        self._traces[tenant, request_id] = trace
        while len(self._traces) > _KEPT_REQUESTS:
            self._traces.popitem(last=False)
        return trace

    def find(self, request_id: str, tenant: str = "") -> RequestTrace | None:
        """By the id of the header, or by the id of the answer."""
        bare = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        return self._traces.get((tenant, request_id)) or self._traces.get((tenant, bare))


def _percentile(ordered: list[float], percent: int) -> float | None:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else None
