"""Compiled calls that can be heard, and made again as they were.

A call is a function and one structure of numbers and addresses. Who enters a `TorchFunctionMode` of torch hears the
calls that are made in it, as it hears torch's own functions; nothing else knows of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.overrides import handle_torch_function, has_torch_function

from farspan.kernels.team.native import load_library

_SOURCE = Path(__file__).with_name("native.cpp")


class _Call(ctypes.Structure):
    """Field for field the Made of native.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("argument", ctypes.c_void_p))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A call that was made. Its structure is never changed again."""

    function: Any
    argument: ctypes.Structure
    keeps: tuple[object, ...]
    """What its addresses point to."""


def run_compiled(function: Any, argument: ctypes.Structure, *keeps: object) -> None:
    """Call `function`, of one address and without a result. `keeps`: the tensors, or what else, that it points to."""
    if has_torch_function(keeps):
        handle_torch_function(run_compiled, keeps, function, argument, *keeps)
        return
    function(ctypes.byref(argument))


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
