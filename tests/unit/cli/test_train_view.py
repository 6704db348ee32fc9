"""What a run shows beside its loss."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.cli.curves import Curves
from farspan.cli.progress import TrainProgress
from farspan.errors import ConfigError
from farspan.telemetry.events import Event, RunFinished, RunResized, StepReport

STEP = StepReport(
    step=1, loss=2.5, learning_rate=1e-3, grad_norm=0.5, tokens=1000, num_labels=900, step_s=1.0, tokens_per_s=1000.0,
    peak_memory_bytes=2**20, bytes_sent=0, model_flops=4e11, utilization=0.4,
)  # fmt: skip


def test_a_step_shows_utilization_and_price_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainProgress(9, 3.6, 2) as progress:
        progress.show(Event(0.0, STEP))
        progress.show(Event(0.0, RunResized(step=1, workers=1, accumulation=2, reason="no room for 2")))
        progress.show(Event(0.0, RunFinished(steps=9, tokens=9000, seconds=3600.0)))
    said = capsys.readouterr().out
    assert "utilization 40.0%  2 per M tokens" in said
    assert "1 workers from step 2, accumulation 2: no room for 2" in said
    assert "cost 3.6, 2 tokens/s per worker" in said


def test_a_step_without_a_known_peak_or_price_shows_neither(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainProgress(9) as progress:
        progress.show(Event(0.0, replace(STEP, utilization=0.0)))
    said = capsys.readouterr().out
    assert "utilization" not in said
    assert "per M tokens" not in said


def test_a_step_shows_what_each_tier_holds_and_how_long_ranks_waited(capsys: pytest.CaptureFixture[str]) -> None:
    held = replace(STEP, device_bytes=3 << 20, dram_bytes=2 << 20, emulated_cxl_bytes=1 << 20)
    with TrainProgress(9) as progress:
        progress.show(Event(0.0, replace(held, exposed_s=0.125, exposed_max_s=0.25)))
        progress.show(Event(0.0, replace(STEP, device_bytes=3 << 20)))
    spread, alone = capsys.readouterr().out.splitlines()
    tiers = "device 3.00 MiB  dram 2.00 MiB  cxl (emulated) 1.00 MiB  exposed 125 ms (max 250 ms)  utilization"
    assert tiers in spread
    assert "device 3.00 MiB  utilization" in alone


def test_tensorboard_is_written_or_refused_with_the_package_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            Curves(str(tmp_path))
        return
    with Curves(str(tmp_path)) as curves:
        curves.record(STEP)
    assert list((tmp_path / "tensorboard").iterdir())
