"""Choose an attention backend: limits.py decides, this loads it. What was chosen, and why not another, is logged once.

A backend that is not installed, or whose library has another interface than we call, is passed over.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from functools import cache

from farspan.kernels.attention.backend import Backend, pairwise_backend
from farspan.kernels.attention.cpu import attend_cpu, attend_cpu_backward
from farspan.kernels.attention.flash import flash_backend
from farspan.kernels.attention.limits import BACKENDS, Ask, decide
from farspan.kernels.attention.tiled import attend_tiled, attend_tiled_backward

logger = logging.getLogger(__name__)


# The same case is asked for by every layer of every step: it is decided, and logged, once.
@cache
def choose_backend(ask: Ask) -> Backend:
    """The best backend of this machine that computes `ask`."""
    absent: dict[str, str] = {}
    while True:
        decision = decide(ask, absent)
        try:
            backend = load_backend(decision.name)
        except (ImportError, AttributeError, OSError) as problem:
            absent[decision.name] = " ".join(str(problem).split())[:200]
            continue
        why = "; ".join(f"{name} {reason}" for name, reason in decision.passed_over if "runs on" not in reason)
        logger.info("attention by %s for %s%s", decision.name, ask, f" ({why})" if why else "")
        return backend


def load_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ImportError: its library is not installed, or has another interface (AttributeError, OSError: is broken).
    """
    return _LOADERS[name]()


def installed_backends(ask: Ask) -> list[Backend]:
    """Every backend of this machine that computes `ask`, the best first: what a bench sets side by side."""
    found = []
    for name, limits in BACKENDS.items():
        if limits.refusal(ask) is None:
            try:
                found.append(load_backend(name))
            except (ImportError, AttributeError, OSError):
                continue
    return found


def triton_backend() -> Backend:
    """Our Triton kernels; packed documents are one launch. Needs Triton, and CUDA tensors or its interpreter."""
    from farspan.kernels.attention.triton import attend_packed_triton, attend_triton
    from farspan.kernels.attention.triton_backward import attend_packed_triton_backward, attend_triton_backward

    return Backend("triton", attend_triton, attend_triton_backward, attend_packed_triton, attend_packed_triton_backward)


def _flash(name: str, room: str) -> Callable[[], Backend]:
    def load() -> Backend:
        return flash_backend(name, importlib.import_module(f"farspan.kernels.attention.{room}").load_kernel())

    return load


_LOADERS: Mapping[str, Callable[[], Backend]] = {
    "flash-attn 3": _flash("flash-attn 3", "flash_three"),
    "torch cudnn": _flash("torch cudnn", "flash_cudnn"),
    "flash-attn 2": _flash("flash-attn 2", "flash_two"),
    "torch flash": _flash("torch flash", "flash_torch"),
    "triton": triton_backend,
    "cpu": lambda: pairwise_backend("cpu", attend_cpu, attend_cpu_backward),
    "tiled": lambda: pairwise_backend("tiled", attend_tiled, attend_tiled_backward),
}
