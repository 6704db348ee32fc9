"""A model on a GPU whose layers are computed by chains is as near to fp32 as transformers' own bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from farspan.engine.attention import ATTENTION_NAME, register_attention
from farspan.engine.blocks import _Block, _Gated
from farspan.engine.faster import speed_up
from farspan.engine.probe import forward, plain_logits, set_attention
from farspan.engine.survey import WatchedAttention

pytestmark = pytest.mark.gpu
LAYERS = 3
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def model_of(architecture: str, head_dim: int, **settings: object):
    config = CONFIG_MAPPING[architecture](**SIZES, head_dim=head_dim, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Weights that leave something of each layer's input, as a trained model's do.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.06) if parameter.ndim > 1 else parameter.normal_(1.0, 0.2)
    # Both models have the same weights, those of bf16.
    return model.eval().bfloat16()


def packed(model, tokens):
    return forward(model, tokens, torch.arange(len(tokens)), WatchedAttention(model), None).float().cpu()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("qwen3", {}), ("gemma2", {"query_pre_attn_scalar": 64})],
    ids=["llama", "llama with biases", "qwen3", "gemma2"],
)
def test_layers_by_chains_on_a_gpu_are_as_near_to_fp32_as_transformers_own(architecture, settings, head_dim) -> None:
    register_attention()
    whole = model_of(architecture, head_dim, **settings)
    wide = copy.deepcopy(whole).float()
    plain, chained = copy.deepcopy(whole).cuda(), whole.cuda()
    for model in (plain, chained):
        set_attention(model, ATTENTION_NAME)
    assert speed_up(chained) > 2 * LAYERS
    forwards = [vars(module).get("forward") for module in chained.modules()]
    assert sum(isinstance(each, _Block) for each in forwards) == LAYERS
    assert sum(isinstance(each, _Gated) for each in forwards) == LAYERS
    for layer in chained.model.layers:
        storages = {getattr(layer.self_attn, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"}
        assert len(storages) == 1, "held in one piece"
    generator = torch.Generator().manual_seed(1)
    # A single row's error is a matter of luck; that of eight is not.
    for count, times in ((1, 8), (3, 4), (7, 2), (200, 1)):
        samples = torch.randint(0, SIZES["vocab_size"], (times, count), generator=generator)
        want = torch.stack([plain_logits(wide, tokens).float() for tokens in samples])
        ours, torchs = (
            float((torch.stack([packed(model, tokens) for tokens in samples]) - want).norm())
            for model in (chained, plain)
        )
        assert ours <= 1.5 * torchs, count
        assert torchs <= 0.1 * float(want.norm()), "a comparison that says nothing"


def test_a_layer_by_chains_is_captured_in_a_graph_and_right_for_other_tokens() -> None:
    register_attention()
    model = model_of("llama", 64).cuda()
    set_attention(model, ATTENTION_NAME)
    assert speed_up(model) > 2 * LAYERS
    layer, turns = model.model.layers[1], model.model.rotary_emb
    for count in (1, 64):
        hidden = torch.randn(1, count, 256, device="cuda", dtype=torch.bfloat16)
        cos_sin = turns(hidden, 5 + torch.arange(count, device="cuda")[None])

        def attend(module, window, q_THD, k_TGD, v_TGC, asked):
            return q_THD + torch.cat((k_TGD, v_TGC), 1)

        with torch.inference_mode():
            given = {"position_embeddings": cos_sin, "farspan_attend": attend}
            layer(hidden, **given)
            other = torch.randn_like(hidden)
            want = layer(other, **given).clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = layer(hidden, **given)
            hidden.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
        assert float((got.float() - want.float()).norm()) <= 1e-2 * float(want.float().norm())
