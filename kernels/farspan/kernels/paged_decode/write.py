"""Keys and values of new tokens go into their pages. Letters: contract.py; T tokens."""

from __future__ import annotations

from torch import Tensor


def write_pages(
    keys_PSGD: Tensor, values_PSGC: Tensor, k_TGD: Tensor, v_TGC: Tensor, page_T: Tensor, slot_T: Tensor
) -> None:
    """Write token t into slot slot_T[t] of page page_T[t]; several may name one place if they write the same there.

    On CUDA one kernel, where torch came with Triton; nothing waits for the device.
    """
    if k_TGD.device.type == "cuda":
        try:
            from farspan.kernels.paged_decode.triton_write import write_pages_triton
        except ImportError:
            pass
        else:
            write_pages_triton(keys_PSGD, values_PSGC, k_TGD, v_TGC, page_T, slot_T)
            return
    keys_PSGD[page_T, slot_T] = k_TGD
    values_PSGC[page_T, slot_T] = v_TGC
