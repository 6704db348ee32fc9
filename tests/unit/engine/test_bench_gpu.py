"""The bench of one GPU holds answers against transformers, and parts of bounds are counted by hand; here on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farspan.engine import bench_gpu as module
from farspan.engine.bench_contenders import FARSPAN, GENERATE
from farspan.engine.bench_gpu import GpuBench, bench_gpu, device_model, prefill_flops, step_bytes

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
}


def small(**settings: object) -> GpuBench:
    given = {
        "shape": TINY,
        "dtype": "float32",
        "device": "cpu",
        "rows": (1, 3),
        "context_tokens": 20,
        "steps": 8,
        "prefill_tokens": 70,
        "turns": 1,
        "peer_turns": 1,
        "kv_bytes": 1 << 20,
        "peers": (GENERATE,),
        "bandwidth_bytes": 1 << 20,
        "peak_width": 64,
        **settings,
    }
    return GpuBench(**given)  # type: ignore[arg-type]


def test_every_work_has_a_row_of_each_contender_and_is_told_as_soon_as_it_is_known() -> None:
    told: list[dict[str, Any]] = []
    rows = bench_gpu(small(), told.append)
    assert rows == told
    works = ["decode, 1 x 20 tokens", "decode, 3 x 20 tokens", "prefill, 70 tokens"]
    assert [(r["work"], r["contender"]) for r in rows if "work" in r] == [
        (work, name) for name in (FARSPAN, GENERATE) for work in works
    ]
    assert not [row for row in rows if "wrong" in row or "not_measured" in row]
    (below,) = [row["most deviations below the best"] for row in rows if "most deviations below the best" in row]
    assert below <= 1e-3
    ours = [row for row in rows if row.get("contender") == FARSPAN and "work" in row]
    assert [row["goal"] for row in ours] == [0.85, 0.85, 0.6]
    assert all(row["speed of farspan / peer"] != 0 for row in rows if row.get("contender") == GENERATE)


def test_wrong_answers_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "how_far_below", lambda model, prompt, answer: float("nan"))
    rows = bench_gpu(small(peers=()))
    assert [row for row in rows if "wrong" in row]
    assert not [row for row in rows if "work" in row]


def test_a_peer_that_fails_and_one_that_is_too_late_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object) -> object:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module, "by_generate", broken)
    rows = bench_gpu(small())
    assert [r["not_measured"] for r in rows if "not_measured" in r] == ["RuntimeError: no kernel image is available"]
    rows = bench_gpu(small(deadline_s=0.0, peers=()))
    assert [r["not_measured"] for r in rows if "work" in r] == ["no time was left"] * 3


def test_the_same_weights_are_made_twice() -> None:
    one, other = device_model(small()), device_model(small())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len({float(p.detach().float().std()) for p in one.parameters()}) > 5


def test_bytes_and_operations_are_those_of_the_model() -> None:
    model = device_model(small())
    # q and o, k and v, three matrices of the MLP, two normalizations.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert step_bytes(model, 3, 20) == 4 * (2 * layer + 32 + 101 * 32 + 3 * 32 + 3 * 20 * 2 * 2 * 2 * 8)
    products = 2 * (layer - 64) * 10 + 2 * 64 * 10
    # Each token sees half of the others: scores and sums over 4 heads of 8, in two layers.
    seen = 2 * (2 * 2 * 10 * 10 / 2 * 32)
    assert prefill_flops(model, 10) == pytest.approx(2 * products + seen + 2 * 101 * 32, rel=0.01)
