"""What a plan needs to know about a model, read from its config: no weights, no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from farspan.models.mixers import MixerFacts, mixer_facts
from farspan.models.rules import LayerRule, layer_rules


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A decoder in numbers."""

    name: str
    num_layers: int
    width: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_parameters: int
    max_positions: int | None = None
    """Longest position the model was made for; none: the config does not say."""
    recurrent_layers: tuple[MixerFacts, ...] = ()
    """Layers without attention, in order."""
    reach: int | None = None
    """Tokens the furthest-seeing attention layer sees back; none: all of its document."""
    attention_rules: tuple[LayerRule, ...] = ()
    """Of the layers that attend; none: all of them without limits."""


def model_facts(config: PretrainedConfig) -> ModelFacts:
    """Count the model of `config` on the meta device (no memory, well under a second)."""
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelFacts(
        name=text.model_type,
        num_layers=text.num_hidden_layers,
        recurrent_layers=mixer_facts(model),
        reach=_reach(config),
        attention_rules=tuple(rule for rule in layer_rules(config) if not rule.recurrent),
        width=text.hidden_size,
        num_q_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        # parameters() gives a tied weight once.
        num_parameters=sum(p.numel() for p in model.parameters()),
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _reach(config: PretrainedConfig) -> int | None:
    reaches = [rule.window or rule.chunk for rule in layer_rules(config) if not rule.recurrent]
    known = [reach for reach in reaches if reach is not None]
    return max(known) if known and len(known) == len(reaches) else None
