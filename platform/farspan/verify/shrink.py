"""A small copy of a model's own config: the same kinds of layers, in the same order, at widths of a few dozen.

Everything that decides *what* is computed is kept (layer kinds, norms, soft caps, scales, partial rotary, query heads
per key head); everything that only decides *how much* is made small. Windows and chunks are made shorter than the
documents of the probe, because a limit that nothing reaches cannot be seen to work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from farspan.errors import ModelError
from farspan.models.rules import layer_kinds

WINDOW, CHUNK, VOCAB, POSITIONS, FLOOR = 7, 6, 64, 512, 4
_MAX_PARAMETERS = 40_000_000
_PROBLEMS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError,
             ZeroDivisionError, StrictDataclassError)  # fmt: skip
# Fields that only say how much, and their small value; a model that does not have one is left without it.
_SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "sliding_window": WINDOW,
    "attention_chunk_size": CHUNK,
    "floor_scale": FLOOR,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
# Shortened even where the widths cannot be: what lies beyond the probe would never be seen.
_LIMITS = ("vocab_size", "sliding_window", "attention_chunk_size", "floor_scale")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def small_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of the shrunk config in fp64 with random weights large enough that every part of it matters.

    Raises:
        ModelError: no small copy of this config can be made.
    """
    problems: list[str] = []
    for widths in (True, False):
        try:
            small = type(config).from_dict(_small_fields(config, widths=widths))
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters())
            if size > _MAX_PARAMETERS:
                raise ValueError(f"the copy would have {size:,} parameters")
            model = _random_model(small, seed)
            model(input_ids=torch.arange(8).unsqueeze(0) % VOCAB, use_cache=False)
            return model
        except _PROBLEMS as problem:
            problems.append(" ".join(str(problem).split())[:200])
    name = config.get_text_config(decoder=True).model_type
    raise ModelError(f"{name}: no small copy can be made to check this model on ({'; '.join(problems)})")


def kept_layers(config: PretrainedConfig) -> list[int]:
    """Which layers the copy has: from the first one on until every kind was met, at least two.

    A prefix, because models derive more than the kind from a layer's number.
    """
    kinds = layer_kinds(config)
    last_new = max(kinds.index(kind) for kind in set(kinds))
    return list(range(min(len(kinds), max(2, last_new + 1))))


def _random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double()
        if model._can_set_experts_implementation():
            # The grouped kernel knows no fp64.
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for weight in model.parameters():
                _enlarge(weight)
    return model.eval()


def _enlarge(weight: nn.Parameter) -> None:
    # transformers begins with weights near zero: attention would be almost uniform and hide what it may not see.
    if weight.ndim >= 2:
        weight.normal_(0.0, 1.3 * weight.shape[-1] ** -0.5)
    else:
        weight.add_(torch.randn_like(weight) * 0.1)


def _small_fields(config: PretrainedConfig, *, widths: bool) -> dict[str, Any]:
    """The config's fields with the small values in; without `widths` only layers, windows and vocabulary shrink."""
    fields = config.to_dict()
    text = fields
    name = next((n for n in ("text_config", "decoder") if isinstance(fields.get(n), dict)), None)
    if name is not None:
        text = fields[name]
    names = config.get_text_config(decoder=True).attribute_map
    layers = kept_layers(config)
    text[names.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    for field in _PER_LAYER:
        if isinstance(text.get(field), list) and len(text[field]) >= len(layers):
            text[field] = [text[field][layer] for layer in layers]
    for common, value in _SMALL.items():
        field = names.get(common, common)
        if isinstance(text.get(field), int) and (widths or field in _LIMITS):
            text[field] = min(value, text[field])
    for field in _TOKENS:
        if text.get(field) is not None:
            text[field] = None
    if widths:
        _shrink_heads(text, names)
    for field in ("dtype", "torch_dtype", "_attn_implementation", "quantization_config"):
        fields.pop(field, None)
        text.pop(field, None)
    return fields


def _shrink_heads(text: dict[str, Any], names: Mapping[str, str]) -> None:
    """As many query heads per key head as the model has; one key head stays one."""
    heads_field, width_field, kv_field = (
        names.get(name, name) for name in ("num_attention_heads", "hidden_size", "num_key_value_heads")
    )
    heads, kv_heads = text[heads_field], text.get(kv_field) or text[heads_field]
    shared = heads // kv_heads
    small_kv = 1 if kv_heads == 1 and heads > 1 else 4 if shared == 1 else 2
    small_heads = min(heads, 8) if small_kv == 1 else shared * small_kv
    text[heads_field] = small_heads
    if text.get(kv_field) is not None:
        text[kv_field] = small_kv
    head_dim = _head_dim(text)
    if text.get("head_dim") is not None:
        text["head_dim"] = head_dim
    text[width_field] = small_heads * head_dim
    if text.get("mamba_n_heads") is not None and text.get("mamba_d_head") is not None:
        text["mamba_d_head"] = int(text.get("mamba_expand", 2) * text[width_field]) // text["mamba_n_heads"]


def _head_dim(text: dict[str, Any]) -> int:
    """The smallest head dim whose rotary part is even, as rotations are."""
    rope = text.get("rope_parameters") or {}
    factor = rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or text.get("rotary_pct") or 1.0
    for head_dim in (8, 16, 20, 32, 40):
        if (
            int(head_dim * factor) % 2 == 0
            and int(head_dim * factor) >= 2
            and head_dim * factor == int(head_dim * factor)
        ):
            return head_dim
    return 64
