"""Whether a recurrent layer goes on from its state when it gets several tokens at once.

Some (Mamba-1 in transformers) begin anew, which a few logits in half precision do not show: every kind of layer is
tried by itself, in double precision where the device has it, on the hidden states it gets inside the model.

Source: the mixers' `slow_forward` of transformers 5, which read the state for one token only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from farspan.engine.recurrent import PackedCache

# Layers that compute in single precision whatever they get differ by about 1e-6; a lost state by far more.
_TOLERANCE = 1e-5


class ContinuityTrial:
    """Stands in for a batch's states (recurrent.py) in one forward of one sequence."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self._seen: set[type] = set()
        self.begins_anew: set[str] = set()
        """Kinds of layers that must be continued one token at a time."""

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mixer = own.args[0]  # type: ignore[attr-defined]
        if type(mixer) not in self._seen:
            self._seen.add(type(mixer))
            self._try(mixer, args, kwargs)
        return own(*map(_without, args), **{name: _without(x) for name, x in kwargs.items()})

    def _try(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3)
        wide = torch.float64 if hidden.device.type == "cpu" else torch.float32
        twin = copy.deepcopy(mixer).to(wide)
        run = partial(type(mixer).forward, twin)
        num_tokens = hidden.shape[1]
        middle = num_tokens // 2

        def part(low: int, high: int, cache: Cache) -> Tensor:
            cut = partial(_cut, num_tokens=num_tokens, low=low, high=high, cache=cache, dtype=wide)
            output = run(*map(cut, args), **{name: cut(x) for name, x in kwargs.items()})
            first = output[0] if isinstance(output, tuple) else output
            assert isinstance(first, Tensor)
            return first

        whole = part(0, num_tokens, DynamicCache(config=self._config))
        cache = DynamicCache(config=self._config)
        part(0, middle, cache)
        error = (part(middle, num_tokens, cache) - whole[:, middle:]).abs().max()
        # Written so that NaN counts as a difference.
        if not float(error) <= _TOLERANCE * float(whole.abs().max()):
            self.begins_anew.add(type(mixer).__name__)


def _without(x: Any) -> Any:
    return None if isinstance(x, PackedCache) else x


def _cut(x: Any, *, num_tokens: int, low: int, high: int, cache: Cache, dtype: torch.dtype) -> Any:
    if isinstance(x, PackedCache):
        return cache
    if isinstance(x, tuple):
        return tuple(_cut(y, num_tokens=num_tokens, low=low, high=high, cache=cache, dtype=dtype) for y in x)
    if not isinstance(x, Tensor):
        return x
    part = x[:, low:high] if x.ndim > 1 and x.shape[:2] == (1, num_tokens) else x
    return part.to(dtype) if part.is_floating_point() else part
