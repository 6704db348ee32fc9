"""Choose how rows are normalized: by the compiled kernel on CPUs, by Triton in bf16 on GPUs, else by torch (None)."""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.chain.dispatch import choose_chain
from farspan.kernels.rms_norm.chained import bind_by
from farspan.kernels.rms_norm.contract import BindRmsNorm
from farspan.kernels.rms_norm.native import DTYPES, load_native

logger = logging.getLogger(__name__)


@cache
def choose_rms_norm(device_type: str, dtype: torch.dtype) -> BindRmsNorm | None:
    """What normalizes faster than torch here; None: nothing does. May compile the kernel, for seconds."""
    if device_type == "cuda":
        bind = choose_chain(device_type, dtype)
        return None if bind is None else bind_by(bind)
    if device_type != "cpu" or dtype not in DTYPES:
        return None
    try:
        return load_native()
    except ImportError as problem:
        logger.info("normalization by torch: %s", problem)
        return None
