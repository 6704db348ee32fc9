"""Decoder layers in two chains of few kernels, before and after attention, and gated MLPs in one. For inference only.

A layer is known by its parts: normalizations, q, k, v and o, a gated MLP. Whether it does with them what most models do
shows in a trial, on the arguments that the model itself gives it: a layer that hands anything else to attention, or
makes something else of what comes back, keeps its own forward. So does every call that the trial does not speak for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from farspan.engine.adjoin import lay_together
from farspan.engine.attention import ATTENTION_NAME, KEYWORD, Asked, Attend
from farspan.engine.parts import Guard, Parts, attention_parts, mlp_parts
from farspan.engine.probe import attention_of, forward
from farspan.engine.survey import WatchedAttention
from farspan.kernels.chain.contract import BindChain, Chain
from farspan.kernels.chain.dispatch import choose_chain, joins_weights

# Largest difference as a part of the norm: that of bf16 numbers summed in another order.
_TOLERANCE = 2e-2
_TRIAL_TOKENS = 5
_TURNS = "position_embeddings"


def switch_blocks(model: PreTrainedModel) -> int:
    """Switch gated MLPs, and decoder layers of a model that is run packed; gives how many modules."""
    bind = choose_chain(model.device.type, model.dtype)
    if bind is None:
        return 0
    if joins_weights(model.device.type):
        _lay_together(model)
    return _switch_mlps(model, bind) + (_switch_layers(model, bind) if attention_of(model) == ATTENTION_NAME else 0)


def _lay_together(model: PreTrainedModel) -> None:
    """Weights that the same rows are multiplied with. Before anything is bound to where they are."""
    with torch.no_grad():
        for module in model.modules():
            mlp, layer = mlp_parts(module), attention_parts(module)
            if mlp is not None:
                lay_together((mlp.gate, mlp.up))
            if layer is not None:
                lay_together((layer.q, layer.k, layer.v))


@dataclass(frozen=True, slots=True)
class _Gated:
    """The forward of a gated MLP."""

    module: nn.Module
    chain: Chain
    width: int
    guard: Guard

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or not self.guard.holds():
            return cast(Tensor, type(self.module).forward(self.module, x))
        rows_TE = x.reshape(-1, self.width)
        return self.chain(rows_TE)[0].view(x.shape)


def _switch_mlps(model: PreTrainedModel, bind: BindChain) -> int:
    count = 0
    for module in model.modules():
        parts = mlp_parts(module)
        if parts is None:
            continue
        chain = bind(parts.steps("x", "y"), {"x": parts.width}, ["y"])
        x_TE = _rows(_TRIAL_TOKENS, parts.width, parts.gate.weight.device)
        with torch.inference_mode():
            own = module(x_TE)
        if isinstance(own, Tensor) and _near(chain(x_TE)[0], own):
            module.forward = _Gated(module, chain, parts.width, Guard.of(module))
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Block:
    """The forward of a decoder layer."""

    layer: nn.Module
    parts: Parts
    before: Chain
    after: Chain
    window: int | None
    asked: Asked
    guard: Guard

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attend: Attend | None = kwargs.get(KEYWORD)
        turns: tuple[Tensor, Tensor] | None = kwargs.get(_TURNS)
        if attend is None or turns is None or not self._fits(hidden_states, args, kwargs):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        x_TE, parts = hidden_states[0], self.parts
        given = (x_TE, turns[0][0], turns[1][0]) if parts.turned else (x_TE,)
        q_TD, k_TD, v_TC = self.before(*given)
        num_tokens = x_TE.shape[0]
        q_THD = q_TD.view(num_tokens, -1, parts.dim)
        k_TGD, v_TGC = k_TD.view(num_tokens, -1, parts.dim), v_TC.view(num_tokens, -1, parts.dim)
        out_THC = attend(parts.attention, self.window, q_THD, k_TGD, v_TGC, self.asked)
        return self.after(out_THC.reshape(num_tokens, -1), x_TE)[0].unsqueeze(0)

    def _fits(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        plain = not args and hidden_states.dtype == torch.bfloat16 and hidden_states.shape[0] == 1
        cached = kwargs.get("past_key_values") is not None or kwargs.get("attention_mask") is not None
        return plain and not cached and self.guard.holds()


def _switch_layers(model: PreTrainedModel, bind: BindChain) -> int:
    layers = {module: parts for module in model.modules() if (parts := attention_parts(module)) is not None}
    given = _given_to(model, list(layers))
    count = 0
    for layer, parts in layers.items():
        block = _fitting(layer, parts, bind, *given[layer]) if layer in given else None
        if block is not None:
            layer.forward = block
            count += 1
    return count


_Given = tuple[tuple[Any, ...], dict[str, Any]]


def _given_to(model: PreTrainedModel, layers: list[nn.Module]) -> dict[nn.Module, _Given]:
    """What a forward of the model calls its layers with; those that it calls once."""
    found: dict[nn.Module, list[_Given]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(layer, []).append((args, kwargs))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        tokens_T = torch.arange(_TRIAL_TOKENS) % model.get_input_embeddings().num_embeddings
        forward(model, tokens_T, 3 + 37 * torch.arange(_TRIAL_TOKENS), WatchedAttention(model), None)
    return {layer: calls[0] for layer, calls in found.items() if len(calls) == 1}


@dataclass(slots=True)
class _Heard:
    """Attention that remembers what it is asked, and gives anything."""

    calls: list[tuple[int | None, Tensor, Tensor, Tensor, Asked]] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, window: int | None, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, asked: Asked
    ) -> Tensor:
        self.calls.append((window, q_THD, k_TGD, v_TGC, asked))
        return _rows(q_THD.shape[0], q_THD.shape[1] * v_TGC.shape[2], q_THD.device).view(*q_THD.shape[:2], -1)


def _fitting(
    layer: nn.Module, parts: Parts, bind: BindChain, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Block | None:
    """The block that does what the layer does; none: nothing that is known here does."""
    turns = kwargs.get(_TURNS)
    if len(args) != 1 or not isinstance(turns, tuple) or len(turns) != 2 or turns[0].shape[0] != 1:
        return None
    # Small beside what the layer adds to it, which otherwise would be lost in rounding.
    x_1TE = 0.05 * _rows(_TRIAL_TOKENS, parts.width, parts.q.weight.device).unsqueeze(0)
    own, y_1TE = _heard(layer, x_1TE, kwargs)
    if len(own.calls) != 1 or not isinstance(y_1TE, Tensor) or own.calls[0][4].sinks_H is not None:
        return None
    window, *_, asked = own.calls[0]
    for turned in (True, False):
        variant = parts.with_turns(turned)
        try:
            before = bind(variant.before(), variant.given(turns[0].shape[-1]), variant.heads)
            after = bind(variant.after(), {"a": variant.attended, "x": parts.width}, ["y"])
            block = _Block(layer, variant, before, after, window, asked, Guard.of(layer))
            ours, got_1TE = _heard(block, x_1TE, kwargs)
        except (AssertionError, RuntimeError):
            # Its parts do not fit together the usual way, or its numbers are of another type.
            continue
        pairs = [*zip(ours.calls[0][1:4], own.calls[0][1:4], strict=True), (got_1TE - x_1TE, y_1TE - x_1TE)]
        if all(_near(got, want) for got, want in pairs):
            return block
    return None


def _heard(run: Callable[..., Any], x_1TE: Tensor, kwargs: dict[str, Any]) -> tuple[_Heard, Any]:
    heard = _Heard()
    with torch.inference_mode():
        return heard, run(x_1TE, **{**kwargs, KEYWORD: heard})


def _rows(count: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)


def _near(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    return float((got.float() - want.float()).norm()) <= _TOLERANCE * float(want.float().norm())
