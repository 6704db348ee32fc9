"""What each layer of a decoder lets a token see, read from the model's config.

A config is the one place where every transformers model says it: the keyword of the attention call, the mask and the
module's attributes each miss it in some models. What the call does say is held against the rule (attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig

from farspan.errors import ModelError

# transformers: a token sees itself and the window - 1 tokens before it, as in the attention contract.
FULL, WINDOW, CHUNK, RECURRENT = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
_BATCH_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class LayerRule:
    """One layer. `window` tokens back, the own one included; `chunk` tokens that see each other; none: no limit.

    A `recurrent` layer has no attention: it carries a state along the whole document.
    """

    window: int | None = None
    chunk: int | None = None
    recurrent: bool = False

    def __str__(self) -> str:
        if self.recurrent:
            return "a recurrent layer"
        limits = [f"{name} {size}" for name, size in (("window", self.window), ("chunk", self.chunk)) if size]
        return f"attention with {' and '.join(limits)}" if limits else "full attention"


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """The kind of each layer, in transformers' words; a config that names none has one kind for all."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return tuple(kinds)
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    chunked = getattr(text, "attention_chunk_size", None)
    return (WINDOW if windowed else CHUNK if chunked else FULL,) * text.num_hidden_layers


def layer_rule(config: PretrainedConfig, layer: int) -> LayerRule:
    """The rule of layer number `layer`.

    Raises:
        ModelError: a kind of layer farspan does not compute.
    """
    text = config.get_text_config(decoder=True)
    kind = layer_kinds(config)[layer]
    if kind == FULL:
        return LayerRule()
    if kind == RECURRENT:
        return LayerRule(recurrent=True)
    if kind == WINDOW:
        return LayerRule(window=_size(text, "sliding_window", kind))
    if kind == CHUNK:
        return LayerRule(chunk=_size(text, "attention_chunk_size", kind))
    known = ", ".join((FULL, WINDOW, CHUNK, RECURRENT))
    raise ModelError(f"{text.model_type}: layer {layer} is of kind {kind}, which is not exact yet; exact are {known}")


def layer_rules(config: PretrainedConfig) -> tuple[LayerRule, ...]:
    """The rule of every layer."""
    return tuple(layer_rule(config, layer) for layer in range(len(layer_kinds(config))))


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Refuse a decoder whose config already says that packed causal attention does not describe it.

    Raises:
        ModelError: what is not exact, and why.
    """
    text = config.get_text_config(decoder=True)
    name = text.model_type
    if not getattr(text, "is_decoder", False) and type(text) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(f"{name}: is an encoder, whose tokens see later ones; only causal decoders train")
    layer_rules(config)
    for field in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if getattr(text, field, None):
            raise ModelError(f"{name}: {field} must be 0: dropped scores differ between layouts; set it to 0")
    if getattr(text, "use_bidirectional_attention", None):
        raise ModelError(f"{name}: use_bidirectional_attention lets tokens see later ones; only causal models train")
    if getattr(text, "attn_temperature_tuning", None):
        raise ModelError(
            f"{name}: attn_temperature_tuning scales queries by their place among the tokens of a call, not in their "
            f"document; set it to false, which is the same up to {getattr(text, 'floor_scale', 1) - 1} tokens"
        )
    if getattr(text, "output_router_logits", False):
        raise ModelError(
            f"{name}: the router's auxiliary loss is not computed over ranks yet; set output_router_logits=false"
        )
    ropes = sorted(_rope_types(text) & set(_BATCH_ROPES))
    if ropes:
        raise ModelError(
            f"{name}: rope_type {ropes[0]} takes its frequencies from the longest position of a batch, so a document's "
            "result would depend on its neighbours; use default, linear, ntk, llama3 or yarn"
        )


def _size(text: PretrainedConfig, field: str, kind: str) -> int:
    size = getattr(text, field, None)
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{text.model_type}: {kind} layers need {field}, got {size!r}")
    return size


def _rope_types(text: PretrainedConfig) -> set[str]:
    """Rope kinds of a config: one for the model, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    several = [value for value in rope.values() if isinstance(value, dict)]
    return {value.get("rope_type", "default") for value in several or [rope]}
