"""Look at a model before serving it: what is refused at once, one packed forward, and what transformers computes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from farspan.engine.attention import KEYWORD
from farspan.errors import ModelError

_SAMPLED_ELEMENTS = 4096
# Prompts that a way to run a model is tried out on.
CHECK_TOKENS = (23, 17)


def refuse_config(config: PretrainedConfig) -> None:
    """Raises ModelError for what no path of the engine computes exactly, as far as the config says it."""
    text = config.get_text_config(decoder=True)
    name = text.model_type
    if not getattr(text, "is_decoder", False) and type(text) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(f"{name}: is an encoder, whose tokens see later ones; only causal decoders are served")
    # "vision": among the tokens of a picture, which this engine never gets.
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise ModelError(f"{name}: use_bidirectional_attention lets tokens see later ones; only causal decoders")
    # Its frequencies depend on the longest sequence computed so far: one request would change another.
    if "dynamic" in rope_types(text):
        raise ModelError(f"{name} has rope_type dynamic, which mixes requests; use default, linear, ntk or yarn")


def exact_experts(model: PreTrainedModel) -> None:
    """Let experts be computed in the model's own type."""
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        # The grouped kernel knows no double precision.
        model.set_experts_implementation("eager")


def check_prompts(model: PreTrainedModel) -> list[Tensor]:
    """What a way to run the model is tried out on."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    return [torch.randint(0, vocab_size, (count,), generator=generator) for count in CHECK_TOKENS]


def rope_types(text: PretrainedConfig) -> set[str]:
    """Kinds of rotation in a config: one for the model, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    several = [value for value in rope.values() if isinstance(value, dict)]
    return {value.get("rope_type", "default") for value in several or [rope]}


def forward(
    model: PreTrainedModel,
    tokens_T: Tensor,
    positions_T: Tensor,
    attend: Any,
    keep: Tensor | None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits [len(keep), V] of a packed forward (all T of them for None)."""
    device = model.device
    given: dict[str, Any] = {"use_cache": cache is not None}
    if accepts(model, "position_ids"):
        given["position_ids"] = positions_T.unsqueeze(0).to(device)
    if accepts(model, "logits_to_keep"):
        given["logits_to_keep"] = 0 if keep is None else keep.to(device)
    if cache is not None:
        given[cache_argument(model)] = cache
    if _takes_anything(model):
        given[KEYWORD] = attend
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens_T.unsqueeze(0).to(device), **given).logits[0]
    return logits if keep is None or logits.shape[0] == len(keep) else logits[keep.to(device)]


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache."""
    for name in ("past_key_values", "cache_params", "state"):
        if accepts(model, name):
            return name
    raise ModelError(f"{type(model).__name__} takes no cache, so that every token would cost the whole sequence")


def plain_logits(model: PreTrainedModel, tokens_T: Tensor, implementation: str | None = None) -> Tensor:
    """Logits [T, V] of the model as transformers computes it."""
    before = attention_of(model)
    set_attention(model, implementation or ("sdpa" if model._supports_sdpa else "eager"))
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=tokens_T.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    finally:
        set_attention(model, before)
    return logits


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation the decoder is switched to."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation or "eager")


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the model, where it is not switched yet. Raises ModelError when it cannot be."""
    if attention_of(model) == name:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as problem:
        raise ModelError(f"{model.config.model_type} cannot change its attention: {problem}") from None


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in _arguments(type(model).forward)


def _takes_anything(model: nn.Module) -> bool:
    return any(kind is inspect.Parameter.VAR_KEYWORD for kind in _arguments(type(model).forward).values())


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> dict[str, Any]:
    """Names and kinds. Asked for in every forward, and slow to find."""
    return {name: parameter.kind for name, parameter in inspect.signature(forward).parameters.items()}


def fingerprint_model(model: PreTrainedModel) -> str:
    """Differs between two models whose weights differ: names, shapes and a sample of every parameter."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].contiguous().cpu()
        content = xxhash.xxh3_64_hexdigest(sample.view(torch.uint8).numpy().data)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {content}".encode())
    return digest.hexdigest()
