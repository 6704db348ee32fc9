"""Configs of the decoders that are first class, as transformers defines them; the doctor shrinks them itself."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

# Only what makes a model's particularity show early: defaults of transformers otherwise.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8},
    "qwen2": {"num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral": {"sliding_window": 4096},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "llama4_text": {"num_local_experts": 4, "attn_temperature_tuning": False},
    "cohere2": {},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 24},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
}


def decoder_config(architecture: str, **settings: Any) -> PretrainedConfig:
    """The config of a real-sized decoder of that architecture."""
    return CONFIG_MAPPING[architecture](**{**SETTINGS.get(architecture, {}), **settings})
