"""The numbers of a run in Ray's Prometheus endpoint, under the names of `telemetry.names`."""

from __future__ import annotations

from ray.util.metrics import Gauge

from farspan.telemetry.events import EventBody
from farspan.telemetry.kinds import KINDS
from farspan.telemetry.names import METRICS


class RunMetrics:
    """One gauge for each number that events of training carry; `run` says whose it is.

    Ray forgets a gauge that nobody set for 20 s: what was told once is told again with every later event.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[type, list[tuple[str, Gauge]]] = {}
        self._told: dict[Gauge, float] = {}
        for metric in METRICS:
            kind, _, field = metric.source.partition(".")
            if kind == "request_served":
                continue
            gauge = Gauge(metric.name, description=f"{metric.meaning} [{metric.unit}]", tag_keys=("run",))
            self._gauges.setdefault(KINDS[kind], []).append((field, gauge))

    def record(self, body: EventBody) -> None:
        """Export what an event says, and what earlier ones said of everything else."""
        for field, gauge in self._gauges.get(type(body), ()):
            self._told[gauge] = float(getattr(body, field))
        for gauge, value in self._told.items():
            gauge.set(value, self._tags)
