"""A bf16 linear layer on a CPU without bf16 arithmetic by native.cpp, called through ctypes. Contract: contract.py.

There torch widens the weights of every call into memory first, and computes several times slower than in fp32.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from farspan.kernels.linear.contract import BindLinear, Linear, check_linear
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
_POINTERS = ("x", "weights", "bias", "y", "scratch", "team")
_NUMBERS = ("rows", "outs", "ins", "x_row", "weight_row", "y_row", "threads")


class _Case(ctypes.Structure):
    """Field for field the Linear of native.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _NUMBERS))


@cache
def load_native() -> BindLinear:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    library, team = load_library(_SOURCE), load_team()
    library.farspan_linear.restype, library.farspan_linear.argtypes = None, [ctypes.c_void_p]
    library.farspan_linear_floats.restype = ctypes.c_int64
    library.farspan_linear_floats.argtypes = [ctypes.c_int64] * 2
    return lambda w_NK, b_N: _bind(library, team, w_NK, b_N)


def _bind(library: ctypes.CDLL, team: int, w_NK: Tensor, b_N: Tensor | None) -> Linear:
    assert w_NK.dtype == torch.bfloat16, f"not compiled for {w_NK.dtype}"
    assert w_NK.stride(1) == 1, "the inputs of an output must lie side by side"
    run, floats = library.farspan_linear, library.farspan_linear_floats
    outs, ins = w_NK.shape
    bias = None if b_N is None else b_N.contiguous()
    # Filled in once: a decode step is many small calls, whose cost is what Python does around them.
    bound = _Case(weights=w_NK.data_ptr(), bias=None if bias is None else bias.data_ptr(), team=team)
    bound.outs, bound.ins, bound.weight_row, bound.y_row = outs, ins, w_NK.stride(0), outs

    def linear_native(x_TK: Tensor) -> Tensor:
        check_linear(x_TK, w_NK, bias)
        if x_TK.stride(1) != 1:
            x_TK = x_TK.contiguous()
        rows, threads = x_TK.shape[0], torch.get_num_threads()
        y_TN = torch.empty((rows, outs), dtype=torch.bfloat16)
        if rows == 0:
            return y_TN
        scratch = torch.empty(floats(rows, ins), dtype=torch.float32)
        case = _Case.from_buffer_copy(bound)
        case.x, case.y, case.scratch = x_TK.data_ptr(), y_TN.data_ptr(), scratch.data_ptr()
        case.rows, case.x_row, case.threads = rows, x_TK.stride(0), threads
        run(ctypes.addressof(case))
        return y_TN

    return linear_native
