"""Attention of prompts over pages by matrix tiles in bf16: native.cpp, called through ctypes. Contract: contract.py."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.paged_prefill.contract import AttendPrompts, Prompts, check_prompts
from farspan.kernels.paged_prefill.shares import Shares, cut_shares
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_library, load_team

_SOURCE = Path(__file__).with_name("native.cpp")
LONGEST_HEAD = 256
_POINTERS = (
    *("q", "keys", "values", "starts", "pasts", "lows", "tables"),
    *("piece_segment", "piece_begin", "piece_count", "share_pieces", "share_common"),
    *("out", "lse", "scratch", "team"),
)
_NUMBERS = (
    *("shares", "groups", "heads", "qk_dim", "v_dim", "slots", "passes", "threads", "window", "causal"),
    *("q_row", "q_head", "key_page", "key_slot", "key_group", "value_page", "value_slot", "value_group", "table_row"),
)


class _Case(ctypes.Structure):
    """Field for field the Case of case.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@cache
def load_native() -> AttendPrompts:
    """The kernel, compiled now if this machine has not done it before.

    Raises ImportError where it cannot be made, and on a processor without matrix tiles.
    """
    library, team = load_library(_SOURCE), load_team()
    library.farspan_has_tiles.restype, library.farspan_has_tiles.argtypes = ctypes.c_int64, []
    for name, result in (("farspan_attend_prompts", None), ("farspan_scratch_bytes", ctypes.c_int64)):
        getattr(library, name).restype = result
        getattr(library, name).argtypes = [ctypes.POINTER(_Case)]
    if not library.farspan_has_tiles():
        raise ImportError("this processor, its system or the compiler has no matrix tiles")

    def attend_prompts_native(
        q_THD: Tensor,
        keys_PSGD: Tensor,
        values_PSGC: Tensor,
        prompts: Prompts,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_prompts(q_THD, keys_PSGD, values_PSGC, prompts, causal, window)
        assert q_THD.dtype == keys_PSGD.dtype == values_PSGC.dtype == torch.bfloat16, "bf16 alone is compiled"
        assert max(q_THD.shape[2], values_PSGC.shape[3]) <= LONGEST_HEAD, f"head dims end at {LONGEST_HEAD}"
        # A pool is far too large to be copied: its views must be plain already.
        assert keys_PSGD.stride(3) == values_PSGC.stride(3) == 1, "the head dim of pages must be contiguous"
        (num_tokens, num_heads, qk_dim), v_dim = q_THD.shape, values_PSGC.shape[3]
        q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
        slots, groups = keys_PSGD.shape[1:3]
        threads = torch.get_num_threads()
        shares = _shares_of(prompts, num_heads // groups, groups, slots, window, threads, 2 * qk_dim + 4 * v_dim)
        out_THC = torch.empty(num_tokens, num_heads, v_dim, dtype=torch.bfloat16)
        lse_TH = torch.empty(num_tokens, num_heads, dtype=torch.float32)
        segments = (prompts.starts_B, prompts.pasts_B, prompts.lows_B, prompts.tables_BN)
        case = _Case(
            *(x.data_ptr() for x in (q_THD, keys_PSGD, values_PSGC, *segments)),
            *(x.ctypes.data for x in (shares.piece_segment, shares.piece_begin, shares.piece_count)),
            *(x.ctypes.data for x in (shares.share_pieces, shares.share_common)),
            *(out_THC.data_ptr(), lse_TH.data_ptr(), None, team),
            *(len(shares), groups, num_heads // groups, qk_dim, v_dim, slots, shares.passes, threads),
            *(window or 0, causal),
            *(*q_THD.stride()[:2], *keys_PSGD.stride()[:3], *values_PSGC.stride()[:3], prompts.tables_BN.stride(0)),
            *(scale, softcap or 0.0),
        )
        scratch = torch.empty(threads * library.farspan_scratch_bytes(ctypes.byref(case)), dtype=torch.uint8)
        case.scratch = scratch.data_ptr()
        given = (q_THD, keys_PSGD, values_PSGC, *segments, shares)
        run_compiled(library.farspan_attend_prompts, case, scratch, *given, out_THC, lse_TH)
        return out_THC, lse_TH

    return attend_prompts_native


def _shares_of(
    prompts: Prompts, heads: int, groups: int, slots: int, window: int | None, threads: int, row_bytes: int
) -> Shares:
    key = heads, groups, slots, window, threads, row_bytes
    if key not in prompts.plans:
        rule: dict[str, Any] = {"slots": slots, "window": window, "threads": threads, "row_bytes": row_bytes}
        numbers = (prompts.lengths_B, prompts.pasts_B, prompts.lows_B, prompts.tables_BN)
        prompts.plans[key] = cut_shares(*(x.numpy() for x in numbers), heads=heads, groups=groups, **rule)
    found: Shares = prompts.plans[key]
    return found
