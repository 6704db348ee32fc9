"""Choose how chains of steps are computed, in bf16: by torch (None) where nothing of ours is faster.

On CPUs ours is, where the processor has no bf16 arithmetic, or matrix tiles; on GPUs wherever Triton is.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.chain.contract import BindChain
from farspan.kernels.chain.native import load_native
from farspan.kernels.processor import has_bf16_arithmetic

logger = logging.getLogger(__name__)


@cache
def choose_chain(device_type: str, dtype: torch.dtype) -> BindChain | None:
    """What computes a chain faster than torch here; None: nothing does. May compile the kernel, for seconds."""
    if dtype != torch.bfloat16:
        return None
    try:
        if device_type == "cpu":
            bind = load_native()
            return bind if bind.tiled or not has_bf16_arithmetic() else None
        return load_triton() if device_type == "cuda" else None
    except ImportError as problem:
        logger.info("chains of steps by torch: %s", problem)
        return None


def load_triton() -> BindChain:
    """Raises ImportError where Triton is not installed, or its kernels do not run on this GPU."""
    # bf16 came with compute capability 8.0; torch for AMD's GPUs calls them cuda too.
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        raise ImportError("written for NVIDIA GPUs of compute capability 8.0 or more")
    from farspan.kernels.chain.triton import bind_chain_triton

    return bind_chain_triton


def joins_weights(device_type: str) -> bool:
    """Whether linear layers over the same rows are one where their weights lie one behind the other."""
    return device_type == "cuda"
