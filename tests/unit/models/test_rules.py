"""What a config says about each layer, against the masks transformers itself makes."""

from __future__ import annotations

import pytest
import torch
from tests.support.decoders import decoder_config
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from farspan.errors import ModelError
from farspan.kernels.attention.reference import visible
from farspan.models.rules import LayerRule, layer_kinds, layer_rule, layer_rules, refuse_unsupported

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_window_of_transformers_is_a_window_of_the_attention_contract(window: int) -> None:
    q, k = torch.arange(12)[:, None], torch.arange(12)[None, :]
    theirs = sliding_window_causal_mask_function(window)(0, 0, q, k)
    assert torch.equal(theirs, visible(12, 12, offset=0, window=window, device=CPU))


def test_a_chunk_of_transformers_is_counted_from_the_first_token() -> None:
    q, k = torch.arange(12)[:, None], torch.arange(12)[None, :]
    theirs = chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long))(0, 0, q, k)
    ours = torch.zeros(12, 12, dtype=torch.bool)
    for a, b in ((0, 5), (5, 10), (10, 12)):
        ours[a:b, a:b] = visible(b - a, b - a, offset=0, window=None, device=CPU)
    assert torch.equal(theirs, ours)


def test_layers_that_differ_have_different_rules() -> None:
    gemma = layer_rules(decoder_config("gemma2"))
    assert gemma[:2] == (LayerRule(window=4096), LayerRule())
    assert set(layer_rules(decoder_config("mistral"))) == {LayerRule(window=4096)}
    assert layer_rules(decoder_config("llama4_text"))[:4] == (*(LayerRule(chunk=8192),) * 3, LayerRule())
    assert layer_rules(decoder_config("qwen3_next"))[:2] == (LayerRule(recurrent=True), LayerRule())


def test_a_window_that_is_switched_off_is_no_window() -> None:
    config = decoder_config("qwen2", use_sliding_window=False, sliding_window=4096)
    assert set(layer_kinds(config)) == {"full_attention"}


REFUSED = {
    "attention_dropout must be 0": ("llama", {"attention_dropout": 0.1}),
    "use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
    "is an encoder": ("bert", {}),
    "attn_temperature_tuning .* the same up to 8191 tokens": ("llama4_text", {"attn_temperature_tuning": True}),
    "auxiliary loss": ("qwen3_next", {"output_router_logits": True}),
    "rope_type dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_config_says_and_cannot_be_exact_is_refused(reason: str) -> None:
    architecture, settings = REFUSED[reason]
    with pytest.raises(ModelError, match=reason):
        refuse_unsupported(decoder_config(architecture, **settings))


def test_a_kind_of_layer_that_is_not_known_is_refused_by_name() -> None:
    config = decoder_config("llama")
    config.layer_types = ["full_attention", "somewhere_attention"]
    with pytest.raises(ModelError, match=r"layer 1 is of kind somewhere_attention.*exact are full_attention"):
        layer_rule(config, 1)
