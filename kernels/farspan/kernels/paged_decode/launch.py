"""How the Triton kernels over pages are launched: plain values, no Triton. Letters: contract.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Query rows of one program: more would spill the accumulator out of the registers.
_MOST_ROWS = 64
# Programs a processor of the GPU works on at once: some read while another computes. Three took 0.78 to 0.85 of the
# time of two on an H200 (64 rows of 4096 and 560 tokens); where shared memory has room for two, the third comes later.
_PROGRAMS_PER_PROCESSOR = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """Size of a tile, number of shares, and how a GPU works on them."""

    tokens: int
    rows: int
    num_programs: int
    num_warps: int = 4
    num_stages: int = 2
    merged_pieces: int = 16
    merge_warps: int = 1

    def num_blocks(self, query_rows: int) -> int:
        return -(-query_rows // self.rows)

    def num_tiles(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens)

    def padded(self, dim: int) -> int:
        """The next power of two, and at least the 16 that a matrix unit multiplies."""
        return max(16, 1 << (dim - 1).bit_length())


def choose_launch(head_dim: int, element_bytes: int, query_rows: int, device: torch.device) -> Launch:
    """Tiles whose keys and values, two stages of each, fit the shared memory of every GPU since Ampere (99 KiB).

    The number of programs is that of the machine, so that it does not change with the lengths.
    """
    row_bytes = max(16, 1 << (head_dim - 1).bit_length()) * element_bytes
    tokens = 128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    num_stages = 2 if row_bytes <= 1024 else 1
    # A merge is of a few pieces: fewer threads come and go sooner, as long as a piece fits into their registers.
    merge_warps = -(-head_dim // 128)
    return Launch(
        tokens,
        min(query_rows, _MOST_ROWS),
        processors * _PROGRAMS_PER_PROCESSOR,
        num_stages=num_stages,
        merge_warps=1 << (merge_warps - 1).bit_length(),
    )


def plain_last(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
