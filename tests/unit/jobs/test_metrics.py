"""What a run told once is exported for as long as the run tells anything."""

from __future__ import annotations

from typing import Any

import pytest

from farspan.jobs.metrics import RunMetrics
from farspan.telemetry.events import Note, PlanPredicted, RunResized, RunRestarted


def test_what_was_told_once_is_told_again_with_every_later_event(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        """Remembers what Ray would be told."""

        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self.name, value, tags))

    def exported(body: Any) -> dict[str, float]:
        told.clear()
        metrics.record(body)
        assert all(tags == {"run": "r"} for _, _, tags in told)
        return {name: value for name, value, _ in told}

    monkeypatch.setattr("farspan.jobs.metrics.Gauge", Gauge)
    metrics = RunMetrics("r")
    planned = {"farspan_predicted_step_seconds": 0.5, "farspan_predicted_device_bytes": 7}
    assert exported(PlanPredicted(step_s=0.5, device_bytes=7)) == planned
    lost = {"farspan_restarted_step": 3, "farspan_redone_steps": 2}
    assert exported(RunRestarted(step=3, redone=2, reason="lost")) == {**planned, **lost}
    size = {"farspan_resized_step": 3, "farspan_train_workers": 1, "farspan_train_accumulation": 2}
    assert exported(RunResized(step=3, workers=1, accumulation=2, reason="room")) == {**planned, **lost, **size}
    lost = {"farspan_restarted_step": 6, "farspan_redone_steps": 0}
    assert exported(RunRestarted(step=6, redone=0, reason="lost")) == {**planned, **lost, **size}
    assert exported(Note(text="nothing")) == {**planned, **lost, **size}
