"""What a run told once is exported for as long as the run goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from farspan.jobs.metrics import RunMetrics
from farspan.telemetry.events import Note, PlanPredicted, RunResized, RunRestarted

DEADLINE_S = 60.0
PLANNED = {"farspan_predicted_step_seconds": 0.5, "farspan_predicted_device_bytes": 7}


class Ray:
    """Remembers what Ray is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, dict[str, str]]] = []
        self.arrived = threading.Condition()

    def gauge(self, name: str, **_: Any) -> Any:
        return Gauge(self, name)


class Gauge:
    def __init__(self, ray: Ray, name: str) -> None:
        self.ray, self.name = ray, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        with self.ray.arrived:
            self.ray.told.append((self.name, value, tags))
            self.ray.arrived.notify_all()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    made = Ray()
    monkeypatch.setattr("farspan.jobs.metrics.Gauge", made.gauge)
    return made


def test_an_event_exports_its_own_numbers_under_the_name_of_the_run(ray: Ray) -> None:
    metrics = RunMetrics("r")

    def exported(body: Any) -> dict[str, float]:
        ray.told.clear()
        metrics.record(body)
        assert all(tags == {"run": "r"} for _, _, tags in ray.told)
        return {name: value for name, value, _ in ray.told}

    assert exported(PlanPredicted(step_s=0.5, device_bytes=7)) == PLANNED
    lost = {"farspan_restarted_step": 3, "farspan_redone_steps": 2, "farspan_restarts": 4}
    assert exported(RunRestarted(step=3, redone=2, reason="lost", restarts=4)) == lost
    size = {"farspan_resized_step": 3, "farspan_train_workers": 1, "farspan_train_accumulation": 2}
    assert exported(RunResized(step=3, workers=1, accumulation=2, reason="room")) == size
    assert exported(Note(text="nothing")) == {}


def test_what_was_told_once_is_told_again_while_nothing_happens_and_no_more_afterwards(ray: Ray) -> None:
    with RunMetrics("r", every_s=0.01) as metrics:
        metrics.record(PlanPredicted(step_s=0.5, device_bytes=7))
        with ray.arrived:
            assert ray.arrived.wait_for(lambda: len(ray.told) >= 6, DEADLINE_S)
    assert {name: value for name, value, _ in ray.told} == PLANNED
    assert not metrics._thread.is_alive()
