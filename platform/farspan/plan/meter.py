"""Watch a computation: bytes alive, operations, memory traffic. Works the same on fake and on real tensors.

A storage counts from the operation that made it until nobody holds it any more. What existed before (weights, inputs)
does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from farspan.activations.memo_tokens import PRODUCTS

_VIEWS = (torch.ops.aten._unsafe_view, torch.ops.aten.detach, torch.ops.aten.lift_fresh)


class Meter(TorchDispatchMode):
    """Totals since it was entered; `where` names the module that is running, for the owner to set."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # Gradients of weights are counted with the weights; nothing else has their shapes, because the lengths that
        # are traced are no model's widths.
        self._weight_shapes = {tuple(sorted(weight.shape)) for weight in weights}
        self.live = self.peak = 0
        self.flops = self.moved = 0
        self.products = 0
        """Bytes that matrix products gave: what a swap by tokens may move."""
        self.where = ""
        self.largest: dict[str, int] = {}
        """Module and operation -> bytes of the largest storage it made."""
        self.maker: dict[int, str] = {}
        """Storage -> module and operation that made it, while it lives."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            self.flops += _grouped_flops(args[0], args[1])
        elif formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if func in PRODUCTS:
            self.products += result.numel() * result.element_size()
        if outputs and not func.is_view and func.overloadpacket not in _VIEWS:
            # What only makes room reads nothing.
            inputs = () if "empty" in str(func) else (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
            for tensor in outputs:
                if tuple(sorted(tensor.shape)) not in self._weight_shapes:
                    self._found(tensor.untyped_storage(), func)
        return result

    def mark(self) -> int:
        """Start watching for a peak; gives the bytes alive now."""
        self.peak = self.live
        return self.live

    def _found(self, storage: torch.UntypedStorage, func: Any) -> None:
        key = storage._cdata
        if key in self.maker:
            return
        size, made_by = storage.nbytes(), f"{self.where}: {func.overloadpacket}"
        self.maker[key] = made_by
        self.largest[made_by] = max(size, self.largest.get(made_by, 0))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._lost, key, size).atexit = False

    def _lost(self, key: int, size: int) -> None:
        del self.maker[key]
        self.live -= size


class SavedBytes:
    """Storages that autograd keeps for backward, each counted once; those of `given` (weights) are not counted."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._known = {storage_key(x) for x in given}
        self.total = 0
        self.by_maker: dict[str, int] = {}

    def add(self, tensor: Tensor, made_by: str = "") -> int:
        """Count `tensor`'s storage unless it is known; gives the bytes added."""
        key = storage_key(tensor)
        if key in self._known:
            return 0
        self._known.add(key)
        size = tensor.untyped_storage().nbytes()
        self.total += size
        self.by_maker[made_by] = self.by_maker.get(made_by, 0) + size
        return size

    @contextmanager
    def counting(self, meter: Meter | None = None) -> Iterator[None]:
        """Count what autograd saves inside."""

        def pack(tensor: Tensor) -> Tensor:
            makers = {} if meter is None else meter.maker
            self.add(tensor, makers.get(storage_key(tensor), ""))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def _grouped_flops(a: Tensor, b: Tensor) -> int:
    """Every row of tokens meets the weights of one expert, or, for their gradient, the gradient of its output."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage()._cdata
