"""A token for each row of logits on a CPU by native.cpp, called through ctypes. Contract: contract.py.

In torch it is a dozen operations over the whole vocabulary, in fp64 and on copies.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from farspan.kernels.sampling.contract import Chosen, Draws, Sampling, check_rows
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
_GIVEN = ("logits", "temperature", "top_p", "asked", "points", "top_k", "told")
_MADE = ("tokens", "best", "margin", "lse", "tops", "sums", "wholes", "least")
_NUMBERS = ("rows", "size", "row", "tiles", "bytes", "threads")


class _Case(ctypes.Structure):
    """Field for field the Case of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_MADE, "team")),
        *((name, ctypes.c_int64) for name in _NUMBERS),
    )


@cache
def load_native() -> Sampling:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    library, team = load_library(_SOURCE), load_team()
    library.farspan_sample.restype, library.farspan_sample.argtypes = None, [ctypes.c_void_p]
    library.farspan_sample_tiles.restype = ctypes.c_int64
    library.farspan_sample_tiles.argtypes = [ctypes.c_int64]

    def sample_native(logits_NV: Tensor, draws: Draws, points_N: Tensor, told_N: Tensor | None = None) -> Chosen:
        check_rows(logits_NV, draws, points_N, told_N)
        logits_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
        rows, size = logits_NV.shape
        tiles = library.farspan_sample_tiles(size)
        tokens_N = torch.empty(rows, dtype=torch.int64)
        best_N, margin_N, lse_N, least_N = made = torch.empty(4, rows, dtype=torch.float64)
        scratch = torch.empty(3, rows, tiles, dtype=torch.float64)
        given = (
            logits_NV, draws.temperature_N, draws.top_p_N, draws.least_N, points_N, draws.top_k_N, told_N
        )  # fmt: skip
        places = (tokens_N, best_N, margin_N, lse_N, *scratch, least_N)
        addresses = [None if x is None else x.data_ptr() for x in (*given, *places)]
        case = _Case(
            *addresses, team, rows, size, logits_NV.stride(0), tiles, logits_NV.itemsize, torch.get_num_threads()
        )
        run_compiled(library.farspan_sample, case, scratch, *(x for x in given if x is not None), tokens_N, made)
        return Chosen(tokens_N, best_N, margin_N, None if told_N is None else lse_N)

    return Sampling(sample_native, cuts=True)
