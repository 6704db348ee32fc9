"""The numbers of a run in Ray's Prometheus endpoint, under the names of `telemetry.names`."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from ray.util.metrics import Gauge

from farspan.telemetry.events import EventBody
from farspan.telemetry.kinds import KINDS
from farspan.telemetry.names import METRICS

# Ray forgets a gauge that nobody set for 20 s.
_TELL_EVERY_S = 5.0


class RunMetrics:
    """One gauge for each number that events of training carry; `run` says whose it is.

    Inside `with`, what was told once is told again every few seconds: a run that hangs, or whose steps are long, shows
    its last numbers and not none.
    """

    def __init__(self, run: str, every_s: float = _TELL_EVERY_S) -> None:
        self._tags = {"run": run}
        self._every_s, self._over, self._lock = every_s, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._tell_again, name="run-metrics", daemon=True)
        self._gauges: dict[type, list[tuple[str, Gauge]]] = {}
        self._told: dict[Gauge, float] = {}
        for metric in METRICS:
            kind, _, field = metric.source.partition(".")
            if kind == "request_served":
                continue
            gauge = Gauge(metric.name, description=f"{metric.meaning} [{metric.unit}]", tag_keys=("run",))
            self._gauges.setdefault(KINDS[kind], []).append((field, gauge))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=_TELL_EVERY_S)

    def record(self, body: EventBody) -> None:
        """Export what an event says."""
        with self._lock:
            for field, gauge in self._gauges.get(type(body), ()):
                self._told[gauge] = float(getattr(body, field))
                gauge.set(self._told[gauge], self._tags)

    def _tell_again(self) -> None:
        while not self._over.wait(self._every_s):
            with self._lock:
                for gauge, value in self._told.items():
                    gauge.set(value, self._tags)
