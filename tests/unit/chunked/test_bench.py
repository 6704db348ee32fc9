"""What a step costs by each way of holding less."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from farspan.chunked.bench import MODES, StepCost, step_cost
from farspan.errors import ConfigError
from farspan.train.loss import PackedLoss


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=2048, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def cost(mode: str, num_tokens: int) -> StepCost:
    return step_cost(
        mode,
        tiny_model,
        PackedLoss,
        num_tokens,
        chunk_tokens=256,
        tile_tokens=128,
        device=torch.device("cpu"),
    )


def test_every_way_gives_the_same_loss_and_tiles_and_chunks_hold_less_than_everything() -> None:
    found = [cost(mode, 2048) for mode in MODES]
    assert all(c.loss == pytest.approx(found[0].loss, rel=1e-5) for c in found)
    assert all(c.seconds > 0 for c in found)
    peaks = dict(zip(MODES, (c.peak_bytes or 0 for c in found), strict=True))
    assert not any(peaks.values()) or peaks["plain"] > max(peaks["tiled"], peaks["seco"])


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of plain, recompute, tiled, seco"):
        cost("magic", 8)
