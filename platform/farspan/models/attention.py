"""farspan's attention inside transformers models, through their public registries.

Shapes: T tokens this rank holds, H query heads, G key/value heads, D head dim.

A model is switched with `use_farspan_attention(model)`. Every forward then receives the keyword
`farspan_attention`, a function (q_THD, k_TGD, v_TGD, scale) -> out_THD, which transformers hands down to each layer.
Nothing is kept between forwards. What the exact path does not cover is refused, by the config before a run
(`refuse_unsupported`) and again inside the layer, because some models decide there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from farspan.errors import ModelError

ATTENTION_NAME = "farspan"
ATTENTION_KEYWORD = "farspan_attention"


class PackedAttention(Protocol):
    """Attention over the packed documents of one forward."""

    def __call__(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, *, scale: float) -> Tensor: ...


def use_farspan_attention(model: PreTrainedModel) -> None:
    """Switch `model`, and only it, to farspan's attention.

    Raises:
        ModelError: the model has a layer whose attention would not be exact.
    """
    refuse_unsupported(model.config)
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    model.set_attn_implementation(ATTENTION_NAME)


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Refuse a decoder with layers that packed causal attention does not describe."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise ModelError(f"{text.model_type}: layers of kind {sorted(kinds)} are not exact yet; full attention is")
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise ModelError(f"{text.model_type}: sliding_window={text.sliding_window} is not exact yet; full attention is")
    if getattr(text, "attn_logit_softcapping", None):
        raise ModelError(f"{text.model_type}: attn_logit_softcapping is not exact yet")
    if getattr(text, "attention_dropout", 0.0):
        raise ModelError(f"{text.model_type}: attention_dropout must be 0: dropped scores differ between layouts")


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """No S x S mask is ever made: which keys a token sees follows from the document bounds."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    farspan_attention: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None)."""
    name = type(module).__name__
    if farspan_attention is None:
        raise ModelError(f"{name} did not pass {ATTENTION_KEYWORD} on; this model cannot be trained exactly")
    unsupported = [k for k in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unsupported or dropout or attention_mask is not None:
        raise ModelError(f"{name} wants {unsupported or 'dropout or a mask'}, which is not exact yet")
    assert query.shape[0] == 1, "a packed batch is one row"
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else q_THD.shape[-1] ** -0.5
    return farspan_attention(q_THD, k_TGD, v_TGD, scale=scale).unsqueeze(0), None


def trunk_and_head(model: PreTrainedModel) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(module giving the last hidden states, function from hidden states to logits) of a causal model.

    Raises:
        ModelError: the model does more after its trunk than one linear head; probed, not assumed.
    """
    trunk, head = model.base_model, model.get_output_embeddings()
    if trunk is model or not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no plain linear head")
    return trunk, head


@torch.no_grad()
def probe_head(config: PretrainedConfig) -> None:
    """Hold trunk + head against the model's own logits, on a copy with one layer.

    Raises:
        ModelError: they differ (a soft cap, a logit scale): the loss would be silently wrong.
    """
    fields = {**config.to_dict(), "num_hidden_layers": 1}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    small = type(config).from_dict(fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    tokens = torch.arange(4).unsqueeze(0) % small.vocab_size
    trunk, head = trunk_and_head(model)
    own = model(input_ids=tokens, use_cache=False).logits
    ours = head(trunk(input_ids=tokens, use_cache=False).last_hidden_state)
    if not torch.allclose(own, ours, rtol=1e-5, atol=1e-6):
        raise ModelError(f"{type(model).__name__} changes its logits after the head; training it is not exact yet")
