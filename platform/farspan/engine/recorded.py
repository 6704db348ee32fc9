"""A step of a CPU that is made again without the Python that made it: compiled calls and what torch computes, in order.

What a graph is on a GPU. A step is run once while everything that reads or writes numbers is heard: torch's operations
below its modules and autograd, and compiled kernels. Made again, each reads and writes where it did. Views are places,
no work: they stay as they are. Whatever looks at numbers to decide what comes next cannot be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.engine.capture import Step
from farspan.kernels.team.calls import Compiled, bind_calls, run_compiled, share_scratch
from farspan.kernels.team.quiet import on_one_thread

_REFUSED = (
    (torch.Tag.data_dependent_output, "looks at numbers"),
    (torch.Tag.dynamic_output_shape, "makes as much as its numbers say"),
    (torch.Tag.nondeterministic_seeded, "draws random numbers"),
)
# What reads numbers behind torch's operations.
_READ = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)


def record(step: Step) -> Step:
    """What computes `step` again, from and into the tensors it used. The capture of CPUs (capture.py).

    Raises what `step` raises, and RuntimeError where it cannot be made again.
    """
    done: list[Compiled | Step] = []
    with _Kernels(done), _Operations(done):
        step()
    steps = _joined(done)

    def again() -> None:
        with torch.inference_mode(), on_one_thread():
            for each in steps:
                each()

    return again


def _joined(done: Sequence[Compiled | Step]) -> list[Step]:
    """Compiled calls in a row as one."""
    compiled = [each for each in done if isinstance(each, Compiled)]
    shared = iter(share_scratch(compiled) if compiled else ())
    steps: list[Step] = []
    row: list[Compiled] = []
    for each in done:
        if isinstance(each, Compiled):
            row.append(next(shared))
            continue
        if row:
            steps.append(bind_calls(row))
            row = []
        steps.append(each)
    return [*steps, bind_calls(row)] if row else steps


class _Kernels(TorchFunctionMode):
    """Hears compiled calls."""

    def __init__(self, done: list[Compiled | Step]) -> None:
        super().__init__()
        self._done = done

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is run_compiled:
            function, argument, scratch, *keeps = args
            self._done.append(Compiled(function, argument, scratch, tuple(keeps)))
        elif func in _READ:
            raise RuntimeError(f"{func.__name__} looks at numbers")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Hears what torch computes."""

    def __init__(self, done: list[Compiled | Step]) -> None:
        super().__init__()
        self._done = done

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # Made of others, of which some may be views and some not.
            with self:
                found = func.decompose(*args, **given)
            if found is not NotImplemented:
                return found
        for tag, what in _REFUSED:
            if tag in func.tags and not _picks_places(func, args):
                raise RuntimeError(f"{func} {what}")
        made = func(*args, **given)
        if (again := _again(func, args, given, made)) is not None:
            self._done.append(again)
        return made


def _again(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> Step | None:
    """What computes the same once more into `made`; none where nothing is computed."""
    if func.is_view or torch.Tag.inplace_view in func.tags or _only_makes_room(func):
        return None
    if func._schema.is_mutable or made is None:
        return lambda: func(*args, **kwargs)
    if func is torch.ops.aten._to_copy.default:
        return lambda: made.copy_(args[0])
    into = getattr(func.overloadpacket, "out", None)
    if isinstance(made, Tensor) and isinstance(into, OpOverload) and _takes_the_same(into, func):
        return lambda: into(*args, **kwargs, out=made)
    places = [made] if isinstance(made, Tensor) else list(made)

    def copy_again() -> None:
        found = func(*args, **kwargs)
        for place, new in zip(places, [found] if isinstance(found, Tensor) else found, strict=True):
            place.copy_(new)

    return copy_again


def _picks_places(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether it takes elements by their places, which makes always as many, and not those that a mask says."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and not any(x is not None and x.dtype in masks for x in args[1])


def _only_makes_room(func: OpOverload) -> bool:
    return func.overloadpacket._qualified_op_name.split("::")[1] in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
    )


def _takes_the_same(into: OpOverload, func: OpOverload) -> bool:
    """Whether one that writes into a given tensor has the arguments of `func`, and nothing but that tensor more."""
    names = [argument.name for argument in into._schema.arguments]
    return names == [*(argument.name for argument in func._schema.arguments), "out"]
