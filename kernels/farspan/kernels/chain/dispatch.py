"""Choose how chains of steps are computed: ours where the processor has no bf16 arithmetic, else by torch (None)."""

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
    if device_type != "cpu" or dtype != torch.bfloat16 or has_bf16_arithmetic():
        return None
    try:
        return load_native()
    except ImportError as problem:
        logger.info("chains of steps by torch: %s", problem)
        return None
