"""Choose what computes the angles of rotary positions: the compiled kernel in bf16 on CPUs, else torch (None)."""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.rotary.contract import BindAngles
from farspan.kernels.rotary.native import load_native

logger = logging.getLogger(__name__)

MOST_TOKENS = 64
"""More are computed by torch, whose threads share them."""


@cache
def choose_angles(device_type: str, dtype: torch.dtype) -> BindAngles | None:
    """What is faster than torch for few tokens; None: nothing is. May compile the kernel, for seconds."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return None
    try:
        return load_native()
    except ImportError as problem:
        logger.info("angles of positions by torch: %s", problem)
        return None
