"""Choose how linear layers are computed: ours where the processor has no bf16 arithmetic, else torch's (None)."""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.linear.contract import BindLinear
from farspan.kernels.linear.native import load_native
from farspan.kernels.processor import has_bf16_arithmetic

logger = logging.getLogger(__name__)


@cache
def choose_linear(device_type: str, dtype: torch.dtype) -> BindLinear | None:
    """What computes a linear layer faster than torch here; None: nothing does.

    Choosing may compile the kernel, once per machine and for seconds.
    """
    if device_type != "cpu" or dtype != torch.bfloat16 or has_bf16_arithmetic():
        return None
    try:
        bind = load_native()
    except ImportError as problem:
        logger.info("bf16 linear layers by torch: %s", problem)
        return None
    logger.info("bf16 linear layers by the compiled kernel: this processor has no bf16 arithmetic")
    return bind
