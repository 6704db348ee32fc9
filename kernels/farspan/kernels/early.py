"""Kernels in Triton that are launched early: their programs come up while those of the kernel before still work.

A kernel with the constant PDL begins, where it is set, with `ask_ahead` for its weights, if it has any, and then
`wait_for_rows`: in every program, before it reads or writes a tensor. Only then may the kernel behind it come up. So
at most two kernels are at work at once, and whatever came before them is complete.
Source: programmatic dependent launch, https://docs.nvidia.com/cuda/cuda-c-programming-guide.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions

# What the cache is asked for are pieces of so many bytes.
_PIECE_BYTES = 16


def early_on(device: torch.device, wanted: bool = True) -> dict[str, Any]:
    """How a kernel with the constant PDL is launched on a device: early where it is wanted and possible."""
    if wanted and device.type == "cuda" and _can_be_early(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _can_be_early(device: torch.device) -> bool:
    """On NVIDIA GPUs since Hopper, where Triton knows of it."""
    known = "launch_pdl" in {field.name for field in fields(CUDAOptions)}
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def bytes_ahead(w: Tensor, most: int) -> int:
    """How much of a row of weights, from its beginning, can be asked for ahead: none where rows begin at odd places."""
    size = w.element_size()
    step = w.stride(0) * size if w.dim() > 1 else 0
    if w.data_ptr() % _PIECE_BYTES or step % _PIECE_BYTES:
        return 0
    return min(most, w.shape[-1] * size) // _PIECE_BYTES * _PIECE_BYTES


@triton.jit
def wait_for_rows():
    """Afterwards all that earlier kernels read and wrote is done, and the kernel behind this one may come up."""
    # Triton's gdc_wait and gdc_launch_dependents, which not every version has.
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def ask_ahead(w_ptr, stride, num_rows, BYTES: tl.constexpr):
    """Have the L2 cache fetch the first BYTES of some rows, of no more than a program has threads.

    No value is read: who writes a weight meanwhile writes it in that cache.
    """
    if BYTES > 0:
        place = w_ptr.to(tl.int64, bitcast=True)
        step = stride.to(tl.int32) * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        # One thread a row.
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            .reg .b32 row;
            .reg .b64 place;
            mov.u32 row, %tid.x;
            setp.lt.s32 inside, row, $3;
            mad.wide.s32 place, row, $2, $1;
            @inside cp.async.bulk.prefetch.L2.global [place], $4;
            mov.u32 $0, row;
            }""",
            "=r,l,r,r,r",
            [place, step, num_rows, tl.full([], BYTES, tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
