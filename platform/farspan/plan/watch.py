"""When each layer of a model starts and ends, and what it keeps, needs and computes in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from farspan.plan.meter import Meter, SavedBytes
from farspan.plan.stubs import WatchedAttention


@dataclass
class Seen:
    """One layer in one run, in bytes and operations."""

    boundary: int = 0
    saved: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    forward_flops: int = 0
    forward_moved: int = 0
    forward_products: int = 0
    backward_flops: int = 0
    backward_moved: int = 0


@dataclass
class Run:
    """One forward and backward at one length."""

    layers: list[Seen]
    outside_saved: int = 0
    tail_saved: int = 0
    """Of it, what comes after the last layer."""
    tail_peak: int = 0
    """Most bytes alive in its backward beyond what was alive before."""
    outside_flops: int = 0
    outside_moved: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)


class Windows:
    """When each layer starts and ends, in forward by hooks on modules, in backward by hooks on its input's gradient."""

    def __init__(
        self,
        meter: Meter,
        saved: SavedBytes,
        run: Run,
        layers: list[nn.Module],
        watch: WatchedAttention,
        recompute: bool,
    ) -> None:
        self.meter, self.saved, self.run, self.layers, self.watch = meter, saved, run, layers, watch
        self.recompute = recompute
        self.open: tuple[Seen, int, int, int, int, int] | None = None
        self.forward = True
        self.before_tail = self.before_backward = 0

    @contextmanager
    def hooked(self, model: nn.Module) -> Any:
        handles = [self._name_modules(name, module) for name, module in model.named_modules()]
        for number, layer in enumerate(self.layers):
            handles.append((layer.register_forward_pre_hook(self._begin(number), with_kwargs=True),))
            handles.append((layer.register_forward_hook(self._end),))
        try:
            yield
        finally:
            for handle in (h for several in handles for h in several):
                handle.remove()

    def forward_done(self) -> None:
        self.forward = False
        self.run.tail_saved = self.saved.total - self.before_tail
        self.before_backward = self.meter.mark()

    def backward_done(self) -> None:
        self._close(backward=True)

    def _name_modules(self, name: str, module: nn.Module) -> tuple[Any, ...]:
        # The number of a layer does not matter to a reader: layers of a kind are alike.
        short = ".".join(part for part in name.split(".") if not part.isdigit()) or type(module).__name__

        def enter(_module: nn.Module, _args: Any) -> None:
            names.append(self.meter.where)
            self.meter.where = short

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.meter.where = names.pop()

        names: list[str] = []
        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def _begin(self, number: int) -> Callable[..., None]:
        def begin(_layer: nn.Module, args: Any, kwargs: Any) -> None:
            seen = self.run.layers[number]
            self.watch.layer = number
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            # Positions and the like are shared by all layers: they are outside, as is what nobody needs a gradient of.
            for tensor in inputs:
                if not tensor.requires_grad:
                    self.saved.add(tensor)
            if self.recompute:
                seen.boundary = sum(self.saved.add(x) for x in inputs if x.requires_grad)
            self._start(seen, backward=False)
            hidden = next(x for x in inputs if x.requires_grad)
            if number > 0 or not hidden.is_leaf:
                hidden.register_hook(lambda _grad: self._turn(number - 1))

        return begin

    def _end(self, layer: nn.Module, _args: Any, output: Any) -> None:
        if not self.forward:
            return
        self._close(backward=False)
        if layer is self.layers[-1]:
            self.before_tail = self.saved.total
            last = output[0] if isinstance(output, tuple) else output
            last.register_hook(lambda _grad: self._turn(len(self.layers) - 1))

    def _turn(self, number: int) -> None:
        """The gradient of layer `number`'s output is there: its backward starts, the one after it has ended."""
        self._close(backward=True)
        if number == len(self.layers) - 1:
            self.run.tail_peak = self.meter.peak - self.before_backward
        if number >= 0:
            self._start(self.run.layers[number], backward=True)

    def _start(self, seen: Seen, *, backward: bool) -> None:
        live = self.meter.mark()
        self.open = (seen, live, self.saved.total, self.meter.flops, self.meter.moved, self.meter.products)

    def _close(self, *, backward: bool) -> None:
        if self.open is None:
            return
        seen, live, saved, flops, moved, products = self.open
        self.open = None
        peak, flops, moved = self.meter.peak - live, self.meter.flops - flops, self.meter.moved - moved
        if backward:
            seen.backward_peak, seen.backward_flops, seen.backward_moved = peak, flops, moved
        else:
            seen.forward_peak, seen.forward_flops, seen.forward_moved = peak, flops, moved
            seen.saved, seen.forward_products = self.saved.total - saved, self.meter.products - products
