"""What MEMO's program must know of a model's layers, found by calling them: bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farspan.activations.memo import LayerCost
from farspan.activations.memo_tokens import ATTENTION, PRODUCTS

# Two operations in backward for each in forward, as everywhere where nothing is known but the forward.
_BACKWARD_OVER_FORWARD = 2.0


def measure_layers(layers: Sequence[nn.Module], forward: Callable[[], object], device: torch.device) -> LayerCost:
    """The mean over `layers` of what they do when `forward` calls each of them once, without autograd.

    It is called twice: bytes are counted in the first call, which takes time, and seconds are taken in the second. All
    products of a layer are counted, also a last one that backward may do without: never too few.
    """
    counted, clock = _Bytes(), _Clock(device)
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(counted.begin, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(counted.end).remove)
        forward()
    with torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(clock.begin).remove)
            stack.callback(layer.register_forward_hook(clock.end).remove)
        forward()
    num = len(layers)
    return LayerCost(
        input_bytes=-(-counted.input_bytes // num),
        attention_bytes=-(-counted.attention_bytes // num),
        rest_bytes=-(-counted.product_bytes // num),
        forward_s=clock.seconds / num,
        backward_s=_BACKWARD_OVER_FORWARD * clock.seconds / num,
    )


class _Bytes(TorchDispatchMode):
    """Counts what the swap would move of every layer it is entered in (memo_tokens.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.input_bytes = self.attention_bytes = self.product_bytes = 0

    def begin(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first tensor a layer is given is its input; the others are shared by all layers.
        self.input_bytes += next(_nbytes(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.__enter__()

    def end(self, *_: object) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self.attention_bytes += _nbytes(out)
        elif func in PRODUCTS:
            self.product_bytes += _nbytes(out)
        return out


@dataclass
class _Clock:
    """Seconds in layers, the device's queue run dry on both sides."""

    device: torch.device
    seconds: float = 0.0
    _started: float = 0.0

    def begin(self, *_: object) -> None:
        self._settle()
        self._started = time.perf_counter()

    def end(self, *_: object) -> None:
        self._settle()
        self.seconds += time.perf_counter() - self._started

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _nbytes(out: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor))
