"""Activation offload: what forward saves waits in another tier until backward needs it.

Saved-tensor hooks take what autograd would keep. Copies run beside the computation; when backward reaches a layer, the
layer before it is already on its way back. Weights, small tensors and the last layers, which backward needs at once,
stay. Layers that are recomputed (non-reentrant checkpointing) save only their input, so that goes to the tier.

Gradients are the same bits with and without: memory is moved, not computed on. Source of the scheme: training.md 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farspan.activations.offload_policy import Action, SavePolicy
from farspan.activations.offload_store import Handle, SavedStore
from farspan.errors import StaleBufferError
from farspan.memory.tier import DEADLINE_S, Allocator

OWNER = "activations"
_MIN_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """Of one step: bytes that left, and seconds the host waited for bytes that came back."""

    stored_bytes: int
    waited_s: float


@dataclass(frozen=True, eq=False, slots=True)
class _Kept:
    """A tensor that stayed; reaching it in backward is the sign to fetch the layer before."""

    tensor: Tensor
    group: int


class ActivationOffload:
    """Offload for one model. Use `with offload.step():` around forward and backward; close it at the end of the run."""

    def __init__(
        self,
        tier: Allocator,
        root: nn.Module,
        layers: Sequence[nn.Module],
        device: torch.device,
        *,
        min_bytes: int = _MIN_BYTES,
        keep_last: int = 1,
        policy: SavePolicy | None = None,
        debug: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """`root` is called once per pass and calls `layers` in order. `debug` finds buffers used again too early.

        Raises:
            ConfigError: the policy recomputes, which these hooks cannot do.
        """
        self._root, self._layers, self._device = root, list(layers), device
        self._min_bytes, self._num_moved = min_bytes, len(self._layers) - keep_last
        self._moving = self._num_moved
        self._policy = policy or SavePolicy()
        self._policy.refuse_recompute()
        self.store = SavedStore(tier, OWNER, debug=debug, deadline_s=deadline_s)
        self.watch_modules = self._policy.asks_for_modules
        self._modules: list[str] = []
        self._resident: frozenset[int] = frozenset()
        self._weights: frozenset[int] = frozenset()
        # Layers that have ended in this pass, and the group of the pass's first layer.
        self._ended = self._first = 0
        self.report = OffloadReport(0, 0.0)

    @contextmanager
    def step(self, share: float = 1.0) -> Iterator[None]:
        """Forward and backward, any number of times. At its end, also by an exception, every buffer is back.

        `share` of the layers, the first ones, give away what they keep; the last layers stay whatever it is.
        """
        self._moving = min(self._num_moved, math.ceil(share * len(self._layers)))
        stored, waited = self.store.stored_bytes, self.store.waited_s
        self._modules, self._ended, self._first = [], 0, 0
        try:
            with ExitStack() as stack:
                self._watch(stack)
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
                yield
        except BaseException as first:
            # What went wrong first is what the caller must see.
            try:
                self.store.close()
            except Exception as second:
                first.add_note(f"closing the step of the offload failed too: {second}")
            raise
        self.store.close()
        if self.store.pool.num_taken:
            raise StaleBufferError(f"{self.store.pool.num_taken} buffers of {OWNER} were not returned; report this")
        self.report = OffloadReport(self.store.stored_bytes - stored, self.store.waited_s - waited)

    def close(self) -> None:
        """Give every buffer back to the tier."""
        self.store.pool.close()

    @property
    def group(self) -> int:
        """The layer that is being computed, counted over all passes of the step."""
        return self._first + self._ended

    @property
    def layer(self) -> int:
        """The layer that is being computed, counted in its pass."""
        return self._ended

    @property
    def module(self) -> str:
        """The innermost module that is being computed; only known to policies that ask for modules."""
        return self._modules[-1] if self._modules else ""

    def moves(self, tensor: Tensor) -> bool:
        """Whether a tensor is worth moving, and may be."""
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout is torch.strided
            and tensor.device == self._device
            and tensor.numel() * tensor.element_size() >= self._min_bytes
            and self._ended < self._moving
            and tensor.untyped_storage().data_ptr() not in self._weights
        )

    def _pack(self, tensor: Tensor) -> Tensor | Handle | _Kept:
        # What recomputation saves is used at once.
        if in_backward():
            return tensor
        if self.moves(tensor) and self._policy.decide(self.module, "*") is Action.OFFLOAD:
            return self.store.save(tensor, self.group)
        return _Kept(tensor, self.group)

    def _unpack(self, saved: Tensor | Handle | _Kept) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        group = saved.group if isinstance(saved, _Kept) else saved.entry.group
        self.store.prefetch(group)
        return saved.tensor if isinstance(saved, _Kept) else self.store.restore(saved)

    def _watch(self, stack: ExitStack) -> None:
        """Hooks that know where the model is; they go with the step."""

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        add(self._root.register_forward_pre_hook(self._begin_pass))
        for layer in self._layers:
            add(layer.register_forward_pre_hook(self._note_weights))
            add(layer.register_forward_hook(self._end_layer))
        if self.watch_modules:
            for name, module in self._root.named_modules():
                add(module.register_forward_pre_hook(cast(Callable[..., None], partial(self._enter, name))))
                add(module.register_forward_hook(self._exit, always_call=True))

    def _begin_pass(self, root: nn.Module, _: Any) -> None:
        if in_backward():
            return
        self._first, self._ended = self._first + (len(self._layers) + 1 if self._ended else 0), 0
        self._resident = self._weights = _places_of(root)

    def _note_weights(self, layer: nn.Module, _: Any) -> None:
        # FSDP2 gathers a layer's weights into new memory each time: where they are is known only now. It frees them
        # after the layer, and what is saved later may lie in the same place: other layers' places are forgotten.
        self._weights = self._resident | _places_of(layer)

    def _end_layer(self, *_: Any) -> None:
        if in_backward():
            return
        self._ended += 1
        self._weights = self._resident
        # Two layers may be on their way out; with a third, the computation waits for the bus.
        self.store.settle(self.group - 1)

    def _enter(self, name: str, *_: Any) -> None:
        self._modules.append(name)

    def _exit(self, *_: Any) -> None:
        if self._modules:
            self._modules.pop()


def _places_of(module: nn.Module) -> frozenset[int]:
    """Where the weights of a module lie now."""
    locals_ = (w.to_local() if isinstance(w, DTensor) else w for w in module.parameters())
    return frozenset(local.untyped_storage().data_ptr() for local in locals_)


def in_backward() -> bool:
    """Whether this thread runs a node of backward. Private in torch, and what its own checkpointing asks."""
    return int(torch._C._current_graph_task_id()) != -1
