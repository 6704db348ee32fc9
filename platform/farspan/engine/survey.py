"""What a model does in one tiny packed forward: its calls of attention, and which of its modules carry a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from farspan.engine.attention import Asked, Call
from farspan.engine.recurrent import PackedCache, has_states
from farspan.errors import ModelError
from farspan.kernels.attention.dispatch import choose_backend
from farspan.kernels.attention.limits import Ask
from farspan.kernels.merge.sink import merge_sinks
from farspan.kernels.paged_decode.dispatch import choose_pages_backend
from farspan.kernels.paged_prefill.dispatch import choose_prompts_backend
from farspan.kv.grouping import EVERYTHING, PageGroup, Reach, group_layers, widest
from farspan.kv.layout import LayerShape
from farspan.kv.states import StateLayout, StateShape
from farspan.models.rules import CHUNK, FULL, RECURRENT, WINDOW, LayerRule, layer_kinds

_PROBE_TOKENS = (5, 3)
# Kinds of layers that compute attention beside a recurrence.
_BESIDE = {"hybrid": FULL, "hybrid_sliding": WINDOW}


@dataclass(slots=True)
class Survey:
    """Enough to run a model packed."""

    calls: list[Call] = field(default_factory=list)
    layers: list[LayerShape] = field(default_factory=list)
    states: StateLayout = field(default_factory=StateLayout)
    mixers: list[nn.Module] = field(default_factory=list)
    """Modules that carry a state."""
    capped: bool = False
    """Some call has a soft cap or sinks."""

    def page_groups(self, longest: int) -> tuple[PageGroup, ...]:
        """Layers that keep the same tokens of a sequence of at most `longest`; a layer keeps what its readers see."""
        reaches: list[Reach] = []
        for store in range(len(self.layers)):
            reach = widest([Reach(call.rule.window, call.rule.chunk) for call in self.calls if call.store == store])
            reaches.append(reach if reach.span is None or reach.span < longest else EVERYTHING)
        return group_layers([layer.token_elements for layer in self.layers], reaches) if reaches else ()


def survey(model: PreTrainedModel, forward: Any) -> Survey:
    """Look at a model that has been switched to paged attention. `forward` runs it packed.

    Raises ModelError for what cannot be run packed.
    """
    found, states = _look(model, forward, _PROBE_TOKENS[0])
    again, states_again = _look(model, forward, _PROBE_TOKENS[1])
    name = model.config.model_type
    if found.layers != again.layers or states != states_again:
        raise ModelError(f"{name}: what its cache holds depends on the number of tokens")
    if not found.layers and not states:
        raise ModelError(f"{name} computes neither attention nor recurrence through transformers' interfaces")
    found.states = StateLayout(states)
    return found


def _look(model: PreTrainedModel, forward: Any, num_tokens: int) -> tuple[Survey, tuple[StateShape, ...]]:
    attend = WatchedAttention(model)
    cache = _WatchedCache(model.config) if has_states(model.config) else None
    tokens_T = torch.arange(num_tokens) % model.get_input_embeddings().num_embeddings
    with _modules_entered(model) as entered:
        if cache is not None:
            cache.entered = entered
        forward(model, tokens_T, torch.arange(num_tokens), attend, None, cache)
    if cache is None:
        return attend.found, ()
    attend.found.mixers = list(cache.mixers.values())
    return attend.found, tuple(_states_of(cache))


class WatchedAttention:
    """Attention of one sequence that remembers what it was asked."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.found = Survey()
        self._config, self._dtype = model.config, model.dtype
        # Kept, so that no later tensor gets the place of an earlier one.
        self._stored: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, module: nn.Module, window: int | None, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, asked: Asked
    ) -> Tensor:
        name = type(module).__name__
        rule = rule_of(self._config, getattr(module, "layer_idx", None))
        if window is not None and window != rule.window:
            raise ModelError(f"{name} asks for a window of {window}, its config says {rule}")
        if k_TGD.shape[:2] != v_TGC.shape[:2] or q_THD.shape[1] % k_TGD.shape[1]:
            raise ModelError(f"{name} has keys {tuple(k_TGD.shape)} and values {tuple(v_TGC.shape)} that do not match")
        if {k_TGD.dtype, v_TGC.dtype} != {self._dtype}:
            raise ModelError(f"{name} has keys of {k_TGD.dtype} in a model of {self._dtype}")
        ask = Ask.of(q_THD, v_TGC, asked.softcap)
        kernel, pages = choose_backend(ask).forward, choose_pages_backend(ask)
        # Layers may share keys (Gemma 3n), and may not share the values of the same keys (differential attention).
        shared = (i for i, seen in enumerate(self._stored) if _same(seen[0], k_TGD) and _same(seen[1], v_TGC))
        store = next(shared, len(self._stored))
        writes = store == len(self._stored)
        if writes:
            self._stored.append((k_TGD, v_TGC))
            self.found.layers.append(LayerShape(k_TGD.shape[1], k_TGD.shape[2], v_TGC.shape[2]))
        self.found.calls.append(Call(rule, store, writes, kernel, pages, prompts=choose_prompts_backend(ask)))
        self.found.capped |= asked.softcap is not None or asked.sinks_H is not None
        out_THC, lse_TH = kernel(q_THD, k_TGD, v_TGC, scale=asked.scale, offset=0, softcap=asked.softcap)
        return out_THC if asked.sinks_H is None else merge_sinks(out_THC, lse_TH, asked.sinks_H)[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class _WatchedCache(PackedCache):
    """Remembers which module asked for the state of a layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config, None)
        self.entered: Sequence[nn.Module] = []
        self.mixers: dict[int, nn.Module] = {}

    def _note(self) -> None:
        self.mixers[id(self.entered[-1])] = self.entered[-1]

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._note()
        return super().get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._note()
        return super().update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._note()
        return super().get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self._note()
        return super().update_recurrent_state(*args, **kwargs)


@contextmanager
def _modules_entered(model: nn.Module) -> Iterator[Sequence[nn.Module]]:
    """The modules whose forward runs, innermost last."""
    entered: list[nn.Module] = []
    handles = []

    def leave(*_: Any) -> None:
        entered.pop()

    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda inner, _: entered.append(inner)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _states_of(cache: Cache) -> Iterator[StateShape]:
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            for index, state in states.items():
                if state is not None:
                    dtype = str(state.dtype).removeprefix("torch.")
                    yield StateShape(number, kind, index, tuple(state.shape[1:]), dtype)


def rule_of(config: PretrainedConfig, layer: int | None) -> LayerRule:
    """What a token sees in a layer that computes attention.

    Raises ModelError for a kind of layer that is not known, or when a module does not say which layer it is.
    """
    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(config)
    if layer is None or layer >= len(kinds):
        if len(set(kinds)) > 1:
            raise ModelError(f"{text.model_type}: a module does not say which of its layers it is, and they differ")
        layer = 0
    kind = _BESIDE.get(kinds[layer], kinds[layer])
    if kind == FULL:
        return LayerRule()
    own = text.per_layer_config[layer]
    if kind == WINDOW:
        return LayerRule(window=own.sliding_window)
    if kind == CHUNK:
        return LayerRule(chunk=own.attention_chunk_size)
    meaning = "recurrent by its config, but computes attention" if kind == RECURRENT else f"of kind {kind}"
    raise ModelError(f"{text.model_type}: layer {layer} is {meaning}")
