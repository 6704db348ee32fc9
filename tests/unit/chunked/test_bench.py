"""What a step costs by each way of holding less: the same loss everywhere, and memory where the formulas say."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from farspan.chunked.bench import MODES, StepCost, step_cost
from farspan.errors import ConfigError
from farspan.train.loss import PackedLoss

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 4, 64


def wide_model() -> LlamaForCausalLM:
    """Key heads that outweigh everything else a token leaves behind."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=512, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def cost(mode: str, num_tokens: int, chunk_tokens: int = 256) -> StepCost:
    return step_cost(
        mode,
        wide_model,
        PackedLoss,
        num_tokens,
        chunk_tokens=chunk_tokens,
        tile_tokens=128,
        device=torch.device("cpu"),
    )


def test_memory_grows_by_16_bytes_per_token_layer_and_key_number_in_fp32_and_the_loss_is_the_same() -> None:
    short, long = cost("seco", 1024), cost("seco", 3072)
    if short.peak_bytes is None or long.peak_bytes is None:
        pytest.skip("this system does not tell the peak memory of a process")
    slope = (long.peak_bytes - short.peak_bytes) / 2048
    assert slope == pytest.approx(16 * KV_HEADS * HEAD_DIM * LAYERS, rel=0.1)


def test_every_way_gives_the_same_loss_and_each_holds_less_than_the_one_before() -> None:
    found = [cost(mode, 2048) for mode in MODES]
    assert all(c.loss == pytest.approx(found[0].loss, rel=1e-5) for c in found)
    assert all(c.seconds > 0 for c in found)
    peaks = dict(zip(MODES, (c.peak_bytes or 0 for c in found), strict=True))
    assert not any(peaks.values()) or peaks["plain"] > peaks["recompute"] > peaks["tiled"]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of plain, recompute, tiled, seco"):
        cost("magic", 8)
