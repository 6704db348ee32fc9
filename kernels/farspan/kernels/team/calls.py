"""Compiled calls that can be heard, and made again as they were.

A call is a function and one structure of numbers and addresses. Who enters a `TorchFunctionMode` of torch hears the
calls that are made in it, as it hears torch's own functions; nothing else knows of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from farspan.kernels.team.native import load_library

_SOURCE = Path(__file__).with_name("native.cpp")
# Bytes of a cache line, at whose beginning scratch may have to begin.
_LINE = 64


class _Call(ctypes.Structure):
    """Field for field the Made of native.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("argument", ctypes.c_void_p))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A call that was made. Its structure belongs to whoever heard it."""

    function: Any
    argument: ctypes.Structure
    scratch: Tensor
    """What it writes and reads, and nobody after it."""
    keeps: tuple[object, ...]
    """Whatever else its addresses point to."""


def run_compiled(function: Any, argument: ctypes.Structure, scratch: Tensor, *keeps: object) -> None:
    """Call `function`, of one address and without a result. `scratch`, `keeps`: the tensors, and more, it points to."""
    heard = (scratch, *keeps)
    if has_torch_function(heard):
        handle_torch_function(run_compiled, heard, function, argument, scratch, *keeps)
        return
    function(ctypes.byref(argument))


def share_scratch(calls: Sequence[Compiled]) -> list[Compiled]:
    """The same calls with one scratch for all of them: they are made one after the other."""
    shared = torch.empty(max(call.scratch.nbytes for call in calls) + _LINE, dtype=torch.uint8)
    begin = -(-shared.data_ptr() // _LINE) * _LINE
    for call in calls:
        at, size = call.scratch.data_ptr(), call.scratch.nbytes
        for name, kind, *_ in call.argument._fields_:
            place = getattr(call.argument, name)
            if kind is ctypes.c_void_p and place is not None and at <= place < at + size:
                setattr(call.argument, name, begin + place - at)
    return [replace(call, scratch=shared) for call in calls]


def bind_calls(calls: Sequence[Compiled]) -> Callable[[], None]:
    """What makes these calls again, one after the other, without Python between them."""
    library = load_library(_SOURCE)
    run = library.farspan_calls
    run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_int64]
    made = (_Call * len(calls))(
        *(_Call(ctypes.cast(call.function, ctypes.c_void_p), ctypes.addressof(call.argument)) for call in calls)
    )
    held = tuple(calls)

    def make_calls() -> None:
        assert held, "calls that are still there"
        run(made, len(made))

    return make_calls
