"""Choose what computes the prompts of a batch in one call, from pages: the compiled kernel, or nothing does (None)."""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.attention.limits import Ask
from farspan.kernels.paged_prefill.contract import AttendPrompts
from farspan.kernels.paged_prefill.native import LONGEST_HEAD, load_native

logger = logging.getLogger(__name__)


@cache
def choose_prompts_backend(ask: Ask) -> AttendPrompts | None:
    """None: each segment is computed by itself.

    Choosing may compile the kernel, once per machine and for seconds.
    """
    if ask.device != "cpu" or ask.dtype != torch.bfloat16 or max(ask.qk_dim, ask.v_dim) > LONGEST_HEAD:
        return None
    try:
        attend = load_native()
    except ImportError as problem:
        logger.info("attention of prompts segment by segment: %s", problem)
        return None
    logger.info("attention of prompts by matrix tiles for %s", ask)
    return attend
