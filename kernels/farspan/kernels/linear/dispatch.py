"""Choose how linear layers are computed: ours without bf16 arithmetic and with matrix tiles, else torch's (None)."""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.linear.contract import BindLinear
from farspan.kernels.linear.native import has_tiles, load_native
from farspan.kernels.processor import has_bf16_arithmetic

logger = logging.getLogger(__name__)


@cache
def choose_linear(device_type: str, dtype: torch.dtype) -> BindLinear | None:
    """What computes a linear layer faster than torch here; None: nothing does.

    Choosing may compile the kernel, once per machine and for seconds.
    """
    if device_type != "cpu" or dtype != torch.bfloat16:
        return None
    try:
        bind, tiled = load_native(), has_tiles()
    except ImportError as problem:
        logger.info("bf16 linear layers by torch: %s", problem)
        return None
    if not tiled and has_bf16_arithmetic():
        return None
    why = "by matrix tiles, of few rows" if tiled else "this processor has no bf16 arithmetic"
    logger.info("bf16 linear layers by the compiled kernel: %s", why)
    return bind
