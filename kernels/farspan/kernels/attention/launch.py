"""How the Triton attention kernels are launched: plain values and small tables, no Triton.

Letters: contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """What the softmax sees of a pair, or of each document (offset 0)."""

    scale: float
    offset: int | None
    window: int | None
    softcap: float | None

    @property
    def shift(self) -> int:
        return self.offset or 0

    @property
    def reach(self) -> int:
        return self.window or 0

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a kernel is compiled for."""
        import triton.language as tl

        return {
            "BAND": self.offset is not None,
            "WINDOWED": self.window is not None,
            # Constants keep the precision of a Python float; arguments of a kernel are rounded to fp32.
            "SCALE": self.scale,
            "CAP": self.softcap or 0.0,
            "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        }


@dataclass(frozen=True, slots=True)
class Tiles:
    """Size of a tile and how a GPU works on it."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    def constants(self, qk_dim: int, v_dim: int) -> dict[str, int]:
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "BLOCK_D": padded_dim(qk_dim),
            "BLOCK_C": padded_dim(v_dim),
        }


def choose_tiles(head_dim: int, element_bytes: int, *, backward: bool = False) -> Tiles:
    """Tiles whose operands fit the shared memory of every GPU since Ampere (99 KiB a block)."""
    row_bytes = padded_dim(head_dim) * element_bytes
    if backward:
        # Four operands and two accumulators live at once.
        side = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        # Two fp32 accumulators of 64 x 128 spill out of the registers of four warps.
        return Tiles(side, side, num_warps=8 if row_bytes == 256 else 4, num_stages=2 if row_bytes <= 256 else 1)
    if row_bytes <= 128:
        return Tiles(128, 64, num_warps=4, num_stages=3)
    if row_bytes <= 256:
        return Tiles(128, 64, num_warps=8, num_stages=2)
    return Tiles(64, 32, num_warps=4, num_stages=2) if row_bytes <= 512 else Tiles(32, 16, num_warps=4, num_stages=1)


def padded_dim(dim: int) -> int:
    """The next power of two, and at least the 16 that a matrix unit multiplies."""
    return max(16, 1 << (dim - 1).bit_length())


def count_tiles(num_rows: int, rows_per_tile: int) -> int:
    return -(-num_rows // rows_per_tile)


def tile_rows(bounds: Sequence[int], rows_per_tile: int) -> list[tuple[int, int, int, int]]:
    """(first row, end of rows, first other, end of others) per tile: no tile holds rows of two documents."""
    return [
        (start, stop, first, stop) for first, stop in pairwise(bounds) for start in range(first, stop, rows_per_tile)
    ]


def tile_table(bounds: Sequence[int] | None, rows_per_tile: int, device: torch.device) -> Tensor | None:
    """int32 table [tiles, 4] of a packed sequence on the device; none for a pair, whose tiles need no table."""
    if bounds is None:
        return None
    return (
        torch.tensor(tile_rows(bounds, rows_per_tile), dtype=torch.int32).reshape(-1, 4).to(device, non_blocking=True)
    )


def with_plain_heads(x: Tensor) -> Tensor:
    """The tensor with head dims contiguous in memory, and rows so near that offsets inside a tile fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(0) < 2**24 else x.contiguous()
