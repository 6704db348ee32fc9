"""The bench of one GPU runs real steps; here it runs them small, on the CPU."""

from __future__ import annotations

import pytest

from farspan.errors import ClusterError
from farspan.train import long_context_gpu
from farspan.train.long_context_gpu import Step, bench_one_gpu

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512}  # fmt: skip


@pytest.mark.long
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


@pytest.mark.long
def test_a_step_whose_process_dies_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context_gpu, "_corpus", lambda scratch, tokens: "/nowhere")
    with pytest.raises(ClusterError, match="a step of 512 tokens died with code 1"):
        bench_one_gpu((Step(2, 512),), TINY, "cpu", "h200")
