"""Keys and values of new tokens go into their pages. Letters: contract.py; T tokens."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from farspan.kernels.paged_decode.native import Case, open_library
from farspan.kernels.team.calls import run_compiled


def write_pages(
    keys_PSGD: Tensor, values_PSGC: Tensor, k_TGD: Tensor, v_TGC: Tensor, page_T: Tensor, slot_T: Tensor
) -> None:
    """Write token t into slot slot_T[t] of page page_T[t]; several may name one place if they write the same there.

    On CUDA one kernel, where torch came with Triton; nothing waits for the device. On a CPU one copy for each token,
    where there is a compiler and the heads of a token lie side by side.
    """
    if k_TGD.device.type == "cuda":
        try:
            from farspan.kernels.paged_decode.triton_write import write_pages_triton
        except ImportError:
            pass
        else:
            write_pages_triton(keys_PSGD, values_PSGC, k_TGD, v_TGC, page_T, slot_T)
            return
    if k_TGD.device.type == "cpu" and _write_compiled(keys_PSGD, values_PSGC, k_TGD, v_TGC, page_T, slot_T):
        return
    keys_PSGD[page_T, slot_T] = k_TGD
    values_PSGC[page_T, slot_T] = v_TGC


@cache
def _compiled() -> ctypes.CDLL | None:
    try:
        return open_library()
    except ImportError:
        return None


def _write_compiled(
    keys_PSGD: Tensor, values_PSGC: Tensor, k_TGD: Tensor, v_TGC: Tensor, page_T: Tensor, slot_T: Tensor
) -> bool:
    """False: not of a kind that is compiled. By this thread alone: waiting for another takes longer than the copies."""
    tensors = (keys_PSGD, values_PSGC, k_TGD, v_TGC)
    plain = all(x.stride()[-2:] == (x.shape[-1], 1) and x.dtype == k_TGD.dtype for x in tensors)
    numbers = page_T.dtype == slot_T.dtype == torch.int64 and slot_T.stride() == (1,)
    if not plain or not numbers or k_TGD.dtype not in (torch.float32, torch.bfloat16) or _compiled() is None:
        return False
    (num_tokens, groups, qk_dim), v_dim = k_TGD.shape, v_TGC.shape[2]
    assert keys_PSGD.shape[2:] == (groups, qk_dim), "keys of these pages"
    assert values_PSGC.shape[2:] == (groups, v_dim), "values of these pages"
    assert len(v_TGC) == len(page_T) == len(slot_T) == num_tokens, "a place for each token"
    case = Case(keys=keys_PSGD.data_ptr(), values=values_PSGC.data_ptr(), rows=num_tokens, groups=groups)
    case.qk_dim, case.v_dim, case.half = qk_dim, v_dim, k_TGD.dtype == torch.bfloat16
    case.key_page, case.key_slot = keys_PSGD.stride()[:2]
    case.value_page, case.value_slot = values_PSGC.stride()[:2]
    case.new_keys, case.k_row = k_TGD.data_ptr(), k_TGD.stride(0)
    case.new_values, case.v_row = v_TGC.data_ptr(), v_TGC.stride(0)
    case.pages, case.page_step, case.places = page_T.data_ptr(), page_T.stride(0), slot_T.data_ptr()
    run_compiled(_compiled().farspan_write_pages, case, torch.empty(0), *tensors, page_T, slot_T)  # type: ignore[union-attr]
    return True
