"""The memory bench measures what is there, and calls emulated what is emulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from farspan.cli.bench import show_results
from farspan.memory.bench import bench_memory


def test_every_tier_found_is_measured_and_emulated_ones_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench_memory(large_bytes=1 << 20, rounds=2, folder=tmp_path)
    assert {"dram", "nvme", "cxl (emulated)"} <= {row["tier"] for row in rows}
    for row in rows:
        assert row["emulated"] == ("emulated" in row["tier"])
        assert row["read_bytes_per_s"] > 0
        assert row["write_latency_s"] > 0
    show_results({"memory": rows}, True, False)
    assert json.loads(capsys.readouterr().out)["memory"] == rows
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_kept_as_a_baseline_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = bench_memory(large_bytes=1 << 20, rounds=1, folder=tmp_path)
    show_results({"memory": rows}, True, True)
    (file,) = (tmp_path / "benchmarks" / "baselines").iterdir()
    assert file.name.startswith("memory-")
    kept = json.loads(file.read_text())
    assert kept["rows"] == rows
    assert kept["machine"]["threads"] == torch.get_num_threads()
    assert str(tmp_path) not in file.read_text(), "a row is named as on every other run"
