"""The bench of one GPU runs real steps; here it runs them small, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY

from farspan.errors import ClusterError
from farspan.train import long_context_gpu
from farspan.train.long_context_gpu import Step, bench_one_gpu, predict

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512}  # fmt: skip


def test_a_row_holds_what_was_predicted_and_what_a_real_step_took() -> None:
    steps = (Step(2, 512, offload=False, num_steps=1), Step(2, 512, num_steps=1))
    alone, offloaded = bench_one_gpu(steps, TINY, "cpu", "h200")
    # The prediction is of this model, not of the real one.
    assert 0 < alone["predicted_gib"] < 0.05
    assert alone["loss"] == offloaded["loss"]
    assert alone["loss"] == pytest.approx(6.2, abs=0.3)
    assert "exposed offload" in offloaded
    assert "exposed offload" not in alone
    assert offloaded["activations"] == "in host memory"


def test_a_step_whose_process_dies_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context_gpu, "_corpus", lambda scratch, tokens: "/nowhere")
    with pytest.raises(ClusterError, match="a step of 512 tokens died with code 1"):
        bench_one_gpu((Step(2, 512),), TINY, "cpu", "h200")


def test_what_an_h200_really_needed_equals_what_is_predicted_now(tmp_path: Path) -> None:
    file = REPOSITORY / "benchmarks/baselines/long-context-nvidia-h200-16-threads.json"
    corpus = long_context_gpu._corpus(tmp_path, 4096)
    for row in json.loads(file.read_text())["rows"]:
        step = Step(row["layers"], row["tokens"], offload=row["activations"] == "in host memory")
        config = long_context_gpu._config(step, corpus, str(tmp_path / "run"), long_context_gpu._LLAMA_8B)
        found = predict(config, "h200").footprint.device
        predicted = sum(size for name, size in found.items() if name != "allocator slack")
        assert predicted == pytest.approx(row["measured_gib"] * 2**30, rel=0.05)
