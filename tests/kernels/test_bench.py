"""The attention bench: right before fast."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from farspan.cli.bench import show_results
from farspan.errors import FarspanError
from farspan.kernels.attention.backend import Backend
from farspan.kernels.attention.bench import Case, bench_attention, document_bounds
from farspan.kernels.attention.dispatch import load_backend

CASES = (Case(96, torch.float32), Case(96, torch.float32, window=20), Case(300, torch.bfloat16, packed=True))
CPU = load_backend("cpu")


def without_window(backend: Backend) -> Backend:
    """A backend with the field's favourite fault: it drops the window."""

    def forward(q, k, v, *, scale, offset, window=None, softcap=None):
        return backend.forward(q, k, v, scale=scale, offset=offset)

    return replace(backend, forward=forward)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's bench compiles its peers")
def test_every_case_is_measured_both_ways_beside_its_peer() -> None:
    rows = bench_attention(CASES)
    assert [(row["pattern"], row["direction"], row["contestant"]) for row in rows] == [
        (pattern, direction, contestant)
        for pattern in ("causal", "window 20", "packed")
        for direction in ("forward", "backward")
        for contestant in ("farspan cpu", "farspan tiled", "torch sdpa")
    ]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["peak_bytes"] >= 0 for row in rows)
    assert all(row["ratio"] == 1.0 for row in rows if row["contestant"] == row["fastest_peer"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's bench compiles its peers")
def test_a_wrong_result_has_no_speed_and_no_baseline(tmp_path, monkeypatch, capsys) -> None:
    rows = bench_attention(CASES[:2], without_window(CPU))
    assert ["wrong" in row for row in rows] == [False] * 4 + [True, False] * 2
    assert not any("ratio" in row or "seconds" in row for row in rows if "wrong" in row)
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FarspanError, match="2 rows of the bench are wrong"):
        show_results({"attention": rows}, as_json=False, save=True)
    assert "ratio" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_a_baseline_is_written_only_when_asked_and_names_the_machine(tmp_path, monkeypatch, capsys) -> None:
    rows = [{"pattern": "causal", "ratio": 1.0}]
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.chdir(tmp_path)
    show_results({"attention": rows}, as_json=True, save=False)
    assert json.loads(capsys.readouterr().out) == {"attention": rows}
    assert not list(tmp_path.rglob("*.json"))
    show_results({"attention": rows}, as_json=True, save=True)
    (path,) = (tmp_path / "benchmarks" / "baselines").glob("attention-*.json")
    saved = json.loads(path.read_text())
    assert saved["rows"] == rows
    assert saved["machine"]["torch"] == torch.__version__


def test_bench_documents_cover_the_sequence_with_short_and_long_ones() -> None:
    bounds = document_bounds(16384)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1]) == (0, 16384)
    assert min(lengths) > 0
    assert max(lengths) > 8 * sorted(lengths)[len(lengths) // 2]
