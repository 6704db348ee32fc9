"""One new token of each row: its key and value go into its page, and it attends to all of them, in one call.

Where decode rows are few, preparing a call costs more than computing it: here all that stays the same for a layer is
prepared once. Contract and letters: contract.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.paged_decode.contract import AttendPages
from farspan.kernels.paged_decode.native import LONGEST_HEAD, SHARES_PER_THREAD, Case, load_native, open_library
from farspan.kernels.team.calls import run_compiled
from farspan.kernels.team.native import load_team


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the new tokens of a batch go and what they see; for all layers of a group of pages."""

    page_B: Tensor
    """int64; its elements may lie apart."""
    place_B: Tensor
    """int64, side by side: the slot in the page."""
    tables_BN: Tensor
    lengths_B: Tensor
    """int32 both; the new tokens count."""


@dataclass(frozen=True, slots=True)
class TokensOfLayer:
    """The kernel with all that stays the same for a layer."""

    library: ctypes.CDLL
    fixed: Case
    keys_PSGD: Tensor
    values_PSGC: Tensor
    num_heads: int
    piece_floats: int
    """Of one program or row."""
    scratch_floats: int
    """Of one thread."""

    def __call__(self, q_BHD: Tensor, k_BGD: Tensor, v_BGC: Tensor, rows: Rows) -> Tensor:
        """Attention output [B, H, C]."""
        num_rows, dtype = len(q_BHD), self.keys_PSGD.dtype
        q_BHD, k_BGD, v_BGC = _by_heads(q_BHD), _by_heads(k_BGD), _by_heads(v_BGC)
        assert q_BHD.dtype == k_BGD.dtype == v_BGC.dtype == dtype, "one type for queries, keys and values"
        assert q_BHD.shape[1:] == (self.num_heads, self.keys_PSGD.shape[3]), "the queries of this layer"
        assert k_BGD.shape[1:] == self.keys_PSGD.shape[2:], "the keys of this layer"
        assert v_BGC.shape[1:] == self.values_PSGC.shape[2:], "the values of this layer"
        threads = torch.get_num_threads()
        programs = threads * SHARES_PER_THREAD if threads > 1 else 1
        out_BHC = torch.empty((num_rows, self.num_heads, v_BGC.shape[2]), dtype=dtype)
        sizes = (num_rows * self.num_heads, (programs + num_rows) * self.piece_floats, threads * self.scratch_floats)
        work = torch.empty(sum(sizes), dtype=torch.float32)
        case = Case.from_buffer_copy(self.fixed)
        # The scratch first: it begins at the beginning of a cache line.
        case.scratch = work.data_ptr()
        case.parts = case.scratch + 4 * sizes[2]
        case.lse = case.parts + 4 * sizes[1]
        case.q, case.out, case.q_row = q_BHD.data_ptr(), out_BHC.data_ptr(), q_BHD.stride(0)
        case.new_keys, case.k_row = k_BGD.data_ptr(), k_BGD.stride(0)
        case.new_values, case.v_row = v_BGC.data_ptr(), v_BGC.stride(0)
        case.pages, case.page_step, case.places = rows.page_B.data_ptr(), rows.page_B.stride(0), rows.place_B.data_ptr()
        case.tables, case.table_row = rows.tables_BN.data_ptr(), rows.tables_BN.stride(0)
        case.lengths, case.rows, case.programs, case.threads = rows.lengths_B.data_ptr(), num_rows, programs, threads
        given, pages = (q_BHD, k_BGD, v_BGC), (self.keys_PSGD, self.values_PSGC)
        run_compiled(self.library.farspan_attend_pages, case, work, *given, *pages, rows, out_BHC)
        return out_BHC


def _by_heads(x_BHD: Tensor) -> Tensor:
    """With the heads of a row side by side."""
    return x_BHD if x_BHD.stride()[1:] == (x_BHD.shape[2], 1) else x_BHD.contiguous()


def bind_tokens(
    attend: AttendPages,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    num_heads: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> TokensOfLayer | None:
    """What computes decode rows of a layer in one call; None where `attend` is not the compiled kernel of CPUs."""
    if keys_PSGD.device.type != "cpu" or keys_PSGD.dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        if attend is not load_native():
            return None
    except ImportError:
        return None
    (_, slots, groups, qk_dim), v_dim = keys_PSGD.shape, values_PSGC.shape[3]
    side_by_side = (keys_PSGD.stride()[2:], values_PSGC.stride()[2:]) == ((qk_dim, 1), (v_dim, 1))
    if not side_by_side or max(qk_dim, v_dim) > LONGEST_HEAD:
        return None
    library = open_library()
    fixed = Case(keys=keys_PSGD.data_ptr(), values=values_PSGC.data_ptr(), team=load_team())
    fixed.queries, fixed.heads, fixed.groups, fixed.slots = 1, num_heads, groups, slots
    fixed.qk_dim, fixed.v_dim, fixed.q_head = qk_dim, v_dim, qk_dim
    fixed.key_page, fixed.key_slot, fixed.key_group = keys_PSGD.stride()[:3]
    fixed.value_page, fixed.value_slot, fixed.value_group = values_PSGC.stride()[:3]
    fixed.window, fixed.causal, fixed.half = window or 0, True, keys_PSGD.dtype == torch.bfloat16
    fixed.scale, fixed.softcap = scale, softcap or 0.0
    pointer = ctypes.byref(fixed)
    floats = library.farspan_piece_floats(pointer), library.farspan_scratch_floats(pointer)
    return TokensOfLayer(library, fixed, keys_PSGD, values_PSGC, num_heads, *floats)
