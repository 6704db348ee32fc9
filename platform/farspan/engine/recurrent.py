"""Recurrent layers in a packed batch: every sequence gets its own state, through transformers' cache layers.

A module that carries a state (delta net, state space, short convolution) is called once per sequence on that
sequence's tokens, with a transformers cache that holds that sequence's state; sequences that compute one token are
stacked and called together. It is done by giving such modules of one model a `forward` of their own, which is the
class's forward wherever no packed cache is passed in.

Shapes: T packed tokens, E model width, B sequences that compute one token, S slots of the state pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from farspan.engine.attention import KEYWORD
from farspan.kv.states import StatePool, StateShape


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens start..start+length of the packed batch continue the state in `slot`; a fresh one begins a sequence."""

    start: int
    length: int
    slot: int
    fresh: bool


class RunsMixers(Protocol):
    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`own`, the module's forward, over every sequence; its output as for one sequence of all tokens."""
        ...


class PackedCache(Cache):
    """What a model's forward gets as its cache: attention keeps keys elsewhere, recurrent layers find `states`.

    Its layers are those transformers would make. Attention's hand on what they get; the recurrent ones are real, and
    used where the model itself computes one sequence (survey.py).
    """

    def __init__(self, config: PretrainedConfig, states: RunsMixers | None) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        self.states = states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0


def has_states(config: PretrainedConfig) -> bool:
    """Whether transformers' cache of this model has layers that carry a state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def swap_forward(mixer: nn.Module) -> None:
    """Give a module, and only it, the forward that knows packed caches."""
    mixer.forward = partial(_forward, mixer)


def restore_forward(mixer: nn.Module) -> None:
    """The class's forward again."""
    vars(mixer).pop("forward", None)


def _forward(mixer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # For attention only; what a recurrent layer does not know it may hand to a kernel that refuses it.
    kwargs.pop(KEYWORD, None)
    own = partial(type(mixer).forward, mixer)
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, PackedCache)), None)
    if cache is None or cache.states is None:
        return own(*args, **kwargs)
    return cache.states.run(own, args, kwargs)


class BatchStates:
    """The states of one packed batch, whose single tokens that continue a sequence come first."""

    def __init__(
        self,
        pool: StatePool,
        stretches: Sequence[Stretch],
        *,
        stepwise: bool,
        window: Callable[[int, int], AbstractContextManager[None]] = lambda low, high: nullcontext(),
    ) -> None:
        """`stepwise`: more than one token of a sequence that has a state are computed one after the other.

        `window` is entered around each call of a module, with the packed tokens the module gets.
        """
        self._pool, self._stepwise, self._window = pool, stepwise, window
        self._num_layers = 1 + max(state.layer for state in pool.layout.states)
        self._num_stacked = next((i for i, s in enumerate(stretches) if s.length != 1 or s.fresh), len(stretches))
        self._stretches = stretches[self._num_stacked :]
        self._slots_B = torch.tensor([s.slot for s in stretches[: self._num_stacked]], device=pool.storage_SB.device)

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_1TE = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3)
        num_tokens = hidden_1TE.shape[1]
        outputs: list[Any] = []
        if self._num_stacked:
            outputs.append(self._run_stacked(own, args, kwargs, num_tokens))
        for stretch in self._stretches:
            size = 1 if self._stepwise and not stretch.fresh else stretch.length
            stops = range(stretch.start, stretch.start + stretch.length + 1, size)
            for number, (low, high) in enumerate(pairwise(stops)):
                cache = self._cache(slice(stretch.slot, stretch.slot + 1), started=not stretch.fresh or number > 0)
                cut = partial(_cut, num_tokens=num_tokens, low=low, high=high, cache=cache)
                with self._window(low, high):
                    outputs.append(own(*map(cut, args), **{name: cut(x) for name, x in kwargs.items()}))
        return _joined(outputs)

    def _run_stacked(
        self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_tokens: int
    ) -> Any:
        # Indexing by slots copies: what the module does to these states is written back afterwards.
        cache = self._cache(self._slots_B, started=True)
        cut = partial(_cut, num_tokens=num_tokens, low=0, high=self._num_stacked, cache=cache, stacked=True)
        with self._window(0, self._num_stacked):
            output = own(*map(cut, args), **{name: cut(x) for name, x in kwargs.items()})
        for number, state in enumerate(self._pool.layout.states):
            self._pool.states_S(number)[self._slots_B] = _kept(cache, state)[state.number]
        return _flat(output)

    def _cache(self, slots: slice | Tensor, *, started: bool) -> Cache:
        """A transformers cache of the states in these slots."""
        layers: list[Any] = [DynamicLayer() for _ in range(self._num_layers)]
        for number, state in enumerate(self._pool.layout.states):
            if isinstance(layers[state.layer], DynamicLayer):
                layers[state.layer] = _layer(self._pool.layout.states, state.layer, started=started)
            values = self._pool.states_S(number)[slots]
            layer = layers[state.layer]
            getattr(layer, f"{state.kind}_states")[state.number] = values
            getattr(layer, f"is_{state.kind}_states_initialized")[state.number] = True
            layer.device, layer.dtype = values.device, values.dtype
            if state.kind == "conv":
                layer.conv_kernel_size[state.number] = values.shape[-1]
        return Cache(layers=layers)


def _layer(states: Sequence[StateShape], layer: int, *, started: bool) -> LinearAttentionLayer:
    made = LinearAttentionLayer(number_of_states=1 + max(s.number for s in states if s.layer == layer))
    made.has_previous_state = dict.fromkeys(made.has_previous_state, started)
    return made


def _kept(cache: Cache, state: StateShape) -> dict[int, Tensor]:
    found: dict[int, Tensor] = getattr(cache.layers[state.layer], f"{state.kind}_states")
    return found


def _cut(x: Any, *, num_tokens: int, low: int, high: int, cache: Cache, stacked: bool = False) -> Any:
    """An argument for tokens low..high alone; `stacked`: [1, T, ...] -> [B, 1, ...]."""
    if isinstance(x, PackedCache):
        return cache
    if isinstance(x, tuple):
        cut = partial(_cut, num_tokens=num_tokens, low=low, high=high, cache=cache, stacked=stacked)
        return tuple(map(cut, x))
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[:2] != (1, num_tokens):
        return x
    part = x[:, low:high]
    return part.transpose(0, 1) if stacked else part


def _flat(output: Any) -> Any:
    """[B, 1, ...] -> [1, B, ...]."""
    if isinstance(output, tuple):
        return tuple(map(_flat, output))
    return output.transpose(0, 1) if isinstance(output, Tensor) else output


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of consecutive tokens as one."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(list(outputs), dim=1) if isinstance(outputs[0], Tensor) else outputs[0]
