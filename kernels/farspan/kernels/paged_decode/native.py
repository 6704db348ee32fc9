"""Attention over pages on CPU by native.cpp, called through ctypes. Contract and letters: contract.py.

Pages are read where they lie, once for all heads of a row; the rows' tiles are shared equally by torch's threads. It
computes in fp32. Many queries per row are a matter of matrix products: they go to matrix tiles (paged_prefill) where
there are any, else to gathered.py.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.attention.limits import Ask
from farspan.kernels.paged_decode.contract import AttendPages, check_pages
from farspan.kernels.paged_decode.gathered import attend_pages_gathered
from farspan.kernels.paged_prefill.contract import AttendPrompts, Prompts
from farspan.kernels.paged_prefill.dispatch import choose_prompts_backend
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
# From this many queries of a row on, gathering for a matrix product is the faster way.
_MANY_QUERIES = 9
# Shares of a thread: one that is held up by another process leaves its later shares to the others.
SHARES_PER_THREAD = 4
LONGEST_HEAD = 512
_POINTERS = ("q", "keys", "values", "log_weights", "tables", "lengths", "out", "lse", "parts", "scratch", "team")
_NEW = ("new_keys", "new_values", "pages", "places")
_NUMBERS = (
    *("rows", "queries", "heads", "groups", "qk_dim", "v_dim", "slots", "q_row", "q_query", "q_head"),
    *("key_page", "key_slot", "key_group", "value_page", "value_slot", "value_group"),
    *("weight_page", "weight_slot", "weight_group", "table_row", "programs", "window", "causal", "half", "threads"),
    *("k_row", "v_row", "page_step"),
)


class Case(ctypes.Structure):
    """Field for field the Case of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_NEW)),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@cache
def open_library() -> ctypes.CDLL:
    """The functions of native.cpp. Raises ImportError where they cannot be made."""
    library = load_library(_SOURCE)
    for name, result in (
        ("farspan_attend_pages", None),
        ("farspan_write_pages", None),
        ("farspan_piece_floats", ctypes.c_int64),
        ("farspan_scratch_floats", ctypes.c_int64),
    ):
        getattr(library, name).restype = result
        getattr(library, name).argtypes = [ctypes.POINTER(Case)]
    return library


@cache
def load_native() -> AttendPages:
    """The kernel, compiled now if this machine has not done it before. Raises ImportError where it cannot be made."""
    library, team = open_library(), load_team()

    def attend_pages_native(
        q_BQHD: Tensor,
        keys_PSGD: Tensor,
        values_PSGC: Tensor,
        tables_BN: Tensor,
        lengths_B: Tensor,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        log_weights_PSG: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rule: dict[str, Any] = {
            "scale": scale, "causal": causal, "window": window, "softcap": softcap, "log_weights_PSG": log_weights_PSG
        }  # fmt: skip
        inputs = (q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B)
        if q_BQHD.shape[1] >= _MANY_QUERIES:
            attend = choose_prompts_backend(Ask.of(q_BQHD, values_PSGC)) if log_weights_PSG is None else None
            if attend is None:
                return attend_pages_gathered(*inputs, **rule)
            check_pages(*inputs, causal, window, log_weights_PSG)
            return _attend_many(attend, *inputs, scale=scale, causal=causal, window=window, softcap=softcap)
        return _attend(library, team, *inputs, **rule)

    return attend_pages_native


def _attend_many(
    attend: AttendPrompts,
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    num_rows, num_queries = q_BQHD.shape[:2]
    lengths_B = lengths_B.to(torch.int32)
    starts_B = torch.arange(0, num_rows * num_queries, num_queries, dtype=torch.int32)
    prompts = Prompts(
        starts_B,
        torch.full_like(lengths_B, num_queries),
        lengths_B - num_queries if causal else lengths_B,
        torch.zeros_like(lengths_B),
        tables_BN.to(torch.int32).contiguous(),
    )
    out_THC, lse_TH = attend(
        q_BQHD.flatten(0, 1),
        keys_PSGD,
        values_PSGC,
        prompts,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return out_THC.view(num_rows, num_queries, *out_THC.shape[1:]), lse_TH.view(num_rows, num_queries, -1)


def _attend(
    library: ctypes.CDLL,
    team: int,
    q_BQHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    tables_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    log_weights_PSG: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_pages(q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B, causal, window, log_weights_PSG)
    assert q_BQHD.dtype == keys_PSGD.dtype == values_PSGC.dtype, "one type for queries, keys and values"
    assert q_BQHD.dtype in (torch.float32, torch.bfloat16), f"not compiled for {q_BQHD.dtype}"
    assert max(q_BQHD.shape[3], values_PSGC.shape[3]) <= LONGEST_HEAD, f"head dims end at {LONGEST_HEAD}"
    # A pool is far too large to be copied: its views must be plain already.
    assert keys_PSGD.stride(3) == values_PSGC.stride(3) == 1, "the head dim of pages must be contiguous"
    (num_rows, num_queries, num_heads, _), v_dim = q_BQHD.shape, values_PSGC.shape[3]
    q_BQHD = q_BQHD if q_BQHD.stride(3) == 1 else q_BQHD.contiguous()
    tables_BN, lengths_B = tables_BN.to(torch.int32).contiguous(), lengths_B.to(torch.int32).contiguous()
    weights_PSG = None if log_weights_PSG is None else log_weights_PSG.to(torch.float32)
    out_BQHC = torch.empty(num_rows, num_queries, num_heads, v_dim, dtype=q_BQHD.dtype)
    lse_BQH = torch.empty(num_rows, num_queries, num_heads, dtype=torch.float32)
    threads = torch.get_num_threads()
    strides = (*q_BQHD.stride()[:3], *keys_PSGD.stride()[:3], *values_PSGC.stride()[:3])
    weight_strides = (0, 0, 0) if weights_PSG is None else weights_PSG.stride()
    programs = threads * SHARES_PER_THREAD if threads > 1 else 1
    case = Case(
        *(x.data_ptr() for x in (q_BQHD, keys_PSGD, values_PSGC)),
        None if weights_PSG is None else weights_PSG.data_ptr(),
        *(x.data_ptr() for x in (tables_BN, lengths_B, out_BQHC, lse_BQH)),
        *(None, None, team),
        *(None,) * len(_NEW),
        *(num_rows, num_queries, num_heads, keys_PSGD.shape[2], q_BQHD.shape[3], v_dim, keys_PSGD.shape[1]),
        *strides,
        *weight_strides,
        *(tables_BN.stride(0), programs, window or 0, causal, q_BQHD.dtype == torch.bfloat16, threads),
        *(0, 0, 0),
        *(scale, softcap or 0.0),
    )
    pointer = ctypes.byref(case)
    parts = torch.empty((programs + num_rows) * library.farspan_piece_floats(pointer), dtype=torch.float32)
    scratch = torch.empty(threads * library.farspan_scratch_floats(pointer), dtype=torch.float32)
    case.parts, case.scratch = parts.data_ptr(), scratch.data_ptr()
    given = (q_BQHD, keys_PSGD, values_PSGC, tables_BN, lengths_B, *(() if weights_PSG is None else (weights_PSG,)))
    run_compiled(library.farspan_attend_pages, case, scratch, *given, out_BQHC, lse_BQH, parts)
    return out_BQHC, lse_BQH
