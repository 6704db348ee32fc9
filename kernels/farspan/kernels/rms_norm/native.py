"""Root-mean-square normalization on a CPU by native.cpp, called through ctypes. Contract: contract.py.

In torch it is seven operations, each with the cost of a call: in decode that is most of what they cost.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from farspan.kernels.rms_norm.contract import BindRmsNorm, Kind, RmsNorm
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
DTYPES = (torch.float32, torch.bfloat16)


class _Case(ctypes.Structure):
    """Field for field the Norm of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "team")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "x_row", "half", "one_more", "threads")),
        ("eps", ctypes.c_float),
    )


@cache
def load_native() -> BindRmsNorm:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    library, team = load_library(_SOURCE), load_team()
    library.farspan_rms_norm.restype, library.farspan_rms_norm.argtypes = None, [ctypes.c_void_p]
    return lambda w_K, eps, kind: _bind(library, team, w_K, eps, kind)


def _bind(library: ctypes.CDLL, team: int, w_K: Tensor, eps: float, kind: Kind) -> RmsNorm:
    assert w_K.dtype in DTYPES, f"not compiled for {w_K.dtype}"
    assert w_K.is_contiguous(), "a weight lies in one piece"
    run, size, dtype = library.farspan_rms_norm, w_K.shape[0], w_K.dtype
    bound = _Case(w=w_K.data_ptr(), size=size, half=dtype == torch.bfloat16, one_more=kind is Kind.ONE_MORE, eps=eps)
    bound.team = team

    def rms_norm_native(x_TK: Tensor) -> Tensor:
        assert x_TK.ndim == 2, "rows of values"
        assert x_TK.shape[1] == size, "as many values as weights"
        assert x_TK.dtype == dtype, "one type"
        if x_TK.stride(1) != 1:
            x_TK = x_TK.contiguous()
        y_TK = torch.empty((x_TK.shape[0], size), dtype=dtype)
        case = _Case.from_buffer_copy(bound)
        case.x, case.y = x_TK.data_ptr(), y_TK.data_ptr()
        case.rows, case.x_row, case.threads = x_TK.shape[0], x_TK.stride(0), torch.get_num_threads()
        run_compiled(run, case, x_TK.new_empty(0), x_TK, w_K, y_TK)
        return y_TK

    return rms_norm_native
