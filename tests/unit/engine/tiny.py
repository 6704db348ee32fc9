"""Tiny random decoders in float64 for tests of the engine and of KV transfer."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from farspan.config.schema import EngineConfig

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_MORE = {"mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "llama": {}}
ARCHITECTURES = sorted(_MORE)


def tiny_model(architecture: str = "llama", seed: int = 0, **settings: object) -> PreTrainedModel:
    config = CONFIG_MAPPING[architecture](**{**_SIZES, **_MORE.get(architecture, {}), **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    # Larger than transformers' initial weights: small ones give one token over and over.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.35)
    return model.eval()


def engine_config(**settings: object) -> EngineConfig:
    given = {"dtype": "float64", "page_tokens": 4, "kv_bytes": 4 * 1024 * 1024, **settings}
    return EngineConfig(**given)  # type: ignore[arg-type]


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reference(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of transformers' own generate, which must not be one token over and over."""
    model.set_attn_implementation("sdpa")
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    assert len(set(tokens)) >= min(6, max_tokens), f"a vacuous reference: {tokens}"
    return tokens
