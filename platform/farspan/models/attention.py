"""farspan's attention inside transformers models, through their public registries.

Shapes: T tokens this rank holds (t in the call shape of strategies), H query heads, G key/value heads, D head dim of
q and k, C of v, E model width.

A model is switched with `use_farspan_attention(model)`. Every forward (`packed_hidden`) then carries two keywords,
which transformers hands down to each layer: the attention of this batch, and, for recurrent layers, the whole
sequence. Nothing is kept between forwards. What a layer may see comes from the config (rules.py); what the exact path
does not cover is refused, by the config before a run and again inside the layer, because some models decide there.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from farspan.errors import ModelError
from farspan.models.mixers import WHOLE_KEYWORD, Whole, hook_mixers, recurrent_mixers
from farspan.models.parts import trunk_and_head
from farspan.models.rules import LayerRule, layer_rule, layer_rules, refuse_unsupported

__all__ = [
    "ATTENTION_KEYWORD",
    "LayeredAttention",
    "PackedAttention",
    "packed_hidden",
    "refuse_unsupported",
    "use_farspan_attention",
]

ATTENTION_NAME = "farspan"
ATTENTION_KEYWORD = "farspan_attention"
_REFUSED = {
    "position_bias": "a bias by position",
    "indexer": "sparse attention by an index",
    "block_mask": "a mask of its own",
}


class PackedAttention(Protocol):
    """Attention over the packed documents of one forward: the call shape of every strategy."""

    def __call__(
        self,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGC: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor: ...


@runtime_checkable
class LayeredAttention(Protocol):
    """Attention that differs from layer to layer, because it remembers keys of each."""

    def of_layer(self, layer: int) -> PackedAttention: ...


def use_farspan_attention(model: PreTrainedModel) -> None:
    """Switch `model`, and only it, to farspan's attention.

    Raises:
        ModelError: the model has a layer whose attention would not be exact.
    """
    refuse_unsupported(model.config)
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        raise ModelError(
            f"{type(model).__name__} does not compute attention through transformers' attention registry, so nothing "
            "can take its place"
        )
    hook_mixers(model)


def packed_hidden(
    model: PreTrainedModel,
    tokens_T: Tensor,
    positions_T: Tensor,
    attention: PackedAttention | LayeredAttention,
    whole: Whole | None,
) -> Tensor:
    """hidden_TE: the last hidden states of packed tokens. `whole` is needed by models with recurrent layers.

    Raises:
        ModelError: a layer wants what is not exact.
    """
    keywords: dict[str, Any] = {ATTENTION_KEYWORD: attention}
    if recurrent_mixers(model):
        if whole is None:
            raise ModelError(f"{type(model).__name__} has recurrent layers, which need the whole sequence")
        keywords[WHOLE_KEYWORD] = whole
    trunk, _ = trunk_and_head(model)
    output = trunk(input_ids=tokens_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False, **keywords)
    return output.last_hidden_state[0]


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
    farspan_attention: PackedAttention | LayeredAttention | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [1, H, T, D], key [1, G, T, D], value [1, G, T, C] -> [1, T, H, C]."""
    name = type(module).__name__
    if farspan_attention is None:
        raise ModelError(f"{name} did not pass {ATTENTION_KEYWORD} on; this model cannot be trained exactly")
    unsupported = [meaning for keyword, meaning in _REFUSED.items() if kwargs.get(keyword) is not None]
    if dropout:
        unsupported.append("attention dropout")
    if attention_mask is not None:
        unsupported.append("a mask of its own")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unsupported.append("attention to later tokens")
    if unsupported:
        raise ModelError(f"{name} wants {' and '.join(unsupported)}, which is not exact yet")
    rule = _rule(module, sliding_window)
    assert query.shape[0] == 1, "a packed batch is one row"
    q_THD, k_TGD, v_TGC = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = scaling if scaling is not None else q_THD.shape[-1] ** -0.5
    attend = _of_layer(module, farspan_attention)
    # A model without sinks is not asked to know the word.
    sinks = {} if s_aux is None else {"sinks_H": s_aux.flatten()}
    out_THC = attend(q_THD, k_TGD, v_TGC, scale=scale, window=rule.window, softcap=softcap, chunk=rule.chunk, **sinks)
    return out_THC.unsqueeze(0), None


def _of_layer(module: nn.Module, attention: PackedAttention | LayeredAttention) -> PackedAttention:
    if not isinstance(attention, LayeredAttention):
        return attention
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ModelError(f"{type(module).__name__} does not say which layer it is, so its keys cannot be kept")
    return attention.of_layer(layer)


def _rule(module: nn.Module, sliding_window: int | None) -> LayerRule:
    """The rule of this layer by the config, which the call must not contradict."""
    name, config, layer = type(module).__name__, getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None:
        raise ModelError(f"{name} keeps no config, so what its layers may see is unknown")
    if layer is None:
        rules = set(layer_rules(config))
        if len(rules) > 1:
            raise ModelError(f"{name} does not say which layer it is, and the layers differ")
        rule = rules.pop()
    else:
        rule = layer_rule(config, layer)
    if rule.recurrent:
        raise ModelError(f"{name}: layer {layer} is recurrent by the config, but it computes attention")
    if sliding_window is not None and sliding_window != rule.window:
        raise ModelError(f"{name}: layer {layer} asks for a window of {sliding_window}, its config says {rule}")
    return rule
