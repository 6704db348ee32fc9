"""Choose how tokens are chosen: on CPUs by the compiled kernel, on GPUs by Triton where it is faster there, else by
torch (None). Either is tried out against the reference first.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from farspan.kernels.sampling.contract import DTYPES, Sampling
from farspan.kernels.sampling.native import load_native
from farspan.kernels.sampling.trial import agrees, is_faster

logger = logging.getLogger(__name__)


@cache
def choose_sampling(device_type: str, dtype: torch.dtype, vocab_size: int) -> Sampling | None:
    """What chooses tokens faster than torch here; None: nothing does.

    May compile the kernel, for seconds, and time it: do it while an engine is built, not in a request.
    """
    if dtype not in DTYPES:
        return None
    if device_type == "cpu":
        return _on_cpu(dtype)
    return _on_cuda(dtype, vocab_size) if device_type == "cuda" else None


@cache
def _on_cpu(dtype: torch.dtype) -> Sampling | None:
    try:
        return _tried(load_native(), "cpu", dtype)
    except ImportError as problem:
        logger.info("tokens are chosen by torch: %s", problem)
        return None


def _on_cuda(dtype: torch.dtype, vocab_size: int) -> Sampling | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from farspan.kernels.sampling.triton import load_triton
    except ImportError as problem:
        logger.info("tokens are chosen by torch: %s", problem)
        return None
    found = _tried(load_triton(), "cuda", dtype)
    if found is not None and not is_faster(found, torch.device("cuda"), dtype, vocab_size):
        logger.info("tokens are chosen by torch: it takes less time here than Triton")
        return None
    return found


def _tried(sampling: Sampling, device_type: str, dtype: torch.dtype) -> Sampling | None:
    if agrees(sampling, torch.device(device_type), dtype):
        return sampling
    logger.warning("tokens are chosen by torch: the kernel for %s on %s chose others in a trial", dtype, device_type)
    return None
