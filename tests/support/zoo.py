"""Tiny random decoders of every kind transformers knows, made from its own config classes.

A config is built with small sizes under whatever names its class has for them; only what a class cannot be built with
is said for it alone.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": 6,
    "attention_chunk_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "qk_head_dim": 10,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "conv_kernel": 4,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "layer_types": None,
    "rope_parameters": None,
    "use_cache": True,
    # A tied head prefers the token it was given: one token over and over.
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def zoo_config(kind: str, **settings: Any) -> PreTrainedConfig:
    """A tiny config of that model type."""
    made = CONFIG_MAPPING[kind]
    known = set(inspect.signature(made.__init__).parameters) | set(getattr(made, "__annotations__", {}))
    known |= {name for base in made.__mro__ for name in vars(base).get("__annotations__", {})}
    sizes = {name: value for name, value in _SIZES.items() if name in known and value is not None}
    if "qk_rope_head_dim" in known:
        # Latent attention: the head dim is that of the rotated part, and every query head has keys of its own.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in known}
    return made(**{**sizes, **SPECIAL.get(kind, {}), **settings})


SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "falcon_h1": {"mamba_d_head": 8, "mamba_chunk_size": 16},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6, "num_heads": 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "modernbert-decoder": dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"], "mamba_dt_rank": 4},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "mamba_d_state": 8,
        "chunk_size": 16,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def zoo_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Random weights, larger than transformers' initial ones: small ones give one token over and over."""
    torch.manual_seed(seed)
    # transformers' grouped kernel for experts does not compute in double precision.
    config = zoo_config(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()
