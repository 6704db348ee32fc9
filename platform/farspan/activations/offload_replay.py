"""Choosing per operator, inside a recomputed layer, what is kept, moved or computed again.

torch's own selective checkpointing treats "offload" as "recompute" in eager mode, silently (training.md 0.9). This is
the same idea in our own context: forward notes what each operator's result becomes; recomputation, which runs the same
operators in the same order, is given those results instead of computing them.

Use: `gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recompute_contexts(offload, policy)})`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from farspan.activations.offload import ActivationOffload
from farspan.activations.offload_policy import Action, SavePolicy
from farspan.activations.offload_store import Handle
from farspan.errors import TrainingError

Op = Any
Give = Callable[[Op, tuple[Any, ...], dict[str, Any]], Any]
ContextFn = Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]]
# Autograd inserts it where tensors are saved, which is not the same in forward and in recomputation.
_UNCOUNTED = (torch.ops.aten.detach.default,)


class Recorder(ABC):
    """Decides what becomes of each operator's result."""

    def __init__(self, offload: ActivationOffload) -> None:
        self.offload = offload
        # Recomputation stops at the last tensor backward needs: what a layer computes after it is not worth keeping.
        self.last_needed: dict[int, int] = {}

    @abstractmethod
    def record(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Give | None]:
        """(the result, how recomputation gets it; none: by computing it)."""


class PolicyRecorder(Recorder):
    """As a policy says, result by result."""

    def __init__(self, offload: ActivationOffload, policy: SavePolicy) -> None:
        super().__init__(offload)
        self._policy = policy

    def record(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Give | None]:
        out = op(*args, **kwargs)
        action = self._policy.decide(self.offload.module, str(op))
        if action is Action.RECOMPUTE or shares_memory(op):
            return out, None
        return out, give_saved(self.offload, out, move=action is Action.OFFLOAD)


def recompute_contexts(offload: ActivationOffload, policy: SavePolicy) -> ContextFn:
    """The `context_fn` of non-reentrant checkpointing for a policy; its default should be RECOMPUTE.

    Results of operators that return views or change their inputs are always computed again.
    """
    offload.watch_modules = offload.watch_modules or policy.asks_for_modules
    return contexts_of(PolicyRecorder(offload, policy))


def contexts_of(recorder: Recorder) -> ContextFn:
    """A fresh pair of contexts for every call of a layer."""

    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        calls = _Calls(recorder.offload.layer)
        return _Forward(recorder, calls), _Recomputation(recorder, calls)

    return contexts


def shares_memory(op: Op) -> bool:
    """Whether an operator's result shares memory with its inputs, or it changes them."""
    schema = op._schema
    return schema.is_mutable or any(value.alias_info is not None for value in schema.returns)


def give_saved(offload: ActivationOffload, out: Any, *, move: bool) -> Give:
    """Keep an operator's results, moved where that is asked for and worth it."""

    def save(tensor: Tensor) -> Handle | Tensor:
        if move and offload.moves(tensor):
            return offload.store.save(tensor, offload.group)
        # Not the tensor itself: it will hold the graph that holds this.
        return tensor.detach()

    saved = tree_map_only(Tensor, save, out)

    def give(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map_only(Handle, offload.store.restore, saved)

    return give


class _Calls:
    """What forward noted about one call of a layer: one (operator, how to get its result) each."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.noted: list[tuple[Op, Give | None]] = []
        self.next = 0
        self._saved: set[int] = set()

    def note(self, op: Op, give: Give | None, out: Any) -> None:
        self.noted.append((op, give))
        if give is not None:
            self._saved.update(x.untyped_storage().data_ptr() for x in tree_leaves(out) if isinstance(x, Tensor))

    def refuse_change(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """
        Raises:
            TrainingError: the operator changes in place what was saved.
        """
        for index, wanted in enumerate(op._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(wanted.name)
            changed = wanted.alias_info is not None and wanted.alias_info.is_write
            if changed and isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._saved:
                raise TrainingError(
                    f"layer {self.layer}: {op} changes in place a result the policy keeps or moves; recompute that "
                    f"result (Rule(Action.RECOMPUTE, op=...))"
                )


class _Forward(TorchDispatchMode):
    def __init__(self, recorder: Recorder, calls: _Calls) -> None:
        super().__init__()
        self._recorder, self._calls = recorder, calls
        self._last = recorder.last_needed.get(calls.layer)

    def __torch_dispatch__(self, func: Op, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNCOUNTED:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._calls.refuse_change(func, args, kwargs)
        if self._last is not None and len(self._calls.noted) > self._last:
            out, give = func(*args, **kwargs), None
        else:
            out, give = self._recorder.record(func, args, kwargs)
        self._calls.note(func, give, out)
        return out


class _Recomputation(TorchDispatchMode):
    def __init__(self, recorder: Recorder, calls: _Calls) -> None:
        super().__init__()
        self._recorder, self._calls = recorder, calls

    def __exit__(self, *exception: Any) -> None:
        reached = max(self._calls.next - 1, self._recorder.last_needed.get(self._calls.layer, 0))
        self._recorder.last_needed[self._calls.layer] = reached
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Op, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNCOUNTED:
            return func(*args, **kwargs)
        calls = self._calls
        if calls.next >= len(calls.noted) or calls.noted[calls.next][0] is not func:
            raise TrainingError(
                f"layer {calls.layer} computed {func} where its forward did not; what a recomputed layer computes must "
                f"not depend on anything that changes between forward and backward"
            )
        _, give = calls.noted[calls.next]
        # Only the graph may hold the result from here on.
        calls.noted[calls.next] = (func, None)
        calls.next += 1
        return func(*args, **kwargs) if give is None else give(func, args, kwargs)
