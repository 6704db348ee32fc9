"""Angles of rotary positions on a CPU by native.cpp, called through ctypes. Contract: contract.py.

In torch they are nine operations of a few dozen numbers: in decode most of what is not compiled.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from farspan.kernels.rotary.contract import Angles, BindAngles
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library

_SOURCE = Path(__file__).with_name("native.cpp")


class _Case(ctypes.Structure):
    """Field for field the Angles of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "frequencies", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("tokens", "step", "size")),
        ("scale", ctypes.c_float),
    )


@cache
def load_native() -> BindAngles:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    run = load_library(_SOURCE).farspan_angles
    run.restype, run.argtypes = None, [ctypes.c_void_p]

    def bind(inv_freq_F: Tensor, scale: float) -> Angles:
        assert inv_freq_F.dtype == torch.float32, f"not compiled for {inv_freq_F.dtype}"
        assert inv_freq_F.is_contiguous(), "frequencies lie in one piece"
        bound = _Case(frequencies=inv_freq_F.data_ptr(), size=len(inv_freq_F), scale=scale)

        def angles_native(positions_T: Tensor) -> tuple[Tensor, Tensor]:
            assert (positions_T.ndim, positions_T.dtype) == (1, torch.int64), "a position of each token"
            shape = (len(positions_T), 2 * len(inv_freq_F))
            cos_TD, sin_TD = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            case = _Case.from_buffer_copy(bound)
            case.positions, case.cos, case.sin = positions_T.data_ptr(), cos_TD.data_ptr(), sin_TD.data_ptr()
            case.tokens, case.step = len(positions_T), positions_T.stride(0)
            run_compiled(run, case, cos_TD.new_empty(0), positions_T, inv_freq_F, cos_TD, sin_TD)
            return cos_TD, sin_TD

        return angles_native

    return bind
