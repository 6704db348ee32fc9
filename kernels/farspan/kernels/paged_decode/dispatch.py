"""Choose a backend over pages: attention/limits.py decides, this loads it, and logs once what was chosen and why.

Choosing may compile the CPU kernel, once per machine and for seconds: do it while an engine is built, not in a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache

from farspan.kernels.attention.limits import Ask, decide
from farspan.kernels.paged_decode.contract import AttendPages
from farspan.kernels.paged_decode.gathered import attend_pages_gathered
from farspan.kernels.paged_decode.limits import BACKENDS
from farspan.kernels.paged_decode.reference import attend_pages_reference

logger = logging.getLogger(__name__)


@cache
def choose_pages_backend(ask: Ask) -> AttendPages:
    """The best backend of this machine that computes `ask`."""
    absent: dict[str, str] = {}
    while True:
        decision = decide(ask, absent, BACKENDS)
        try:
            attend = load_pages_backend(decision.name)
        except (ImportError, AttributeError, OSError) as problem:
            absent[decision.name] = " ".join(str(problem).split())[:300]
            continue
        why = "; ".join(f"{name} {reason}" for name, reason in decision.passed_over if "runs on" not in reason)
        logger.info("attention over pages by %s for %s%s", decision.name, ask, f" ({why})" if why else "")
        return attend


def gathers(attend: AttendPages) -> bool:
    """Whether a backend copies the pages of all rows side by side: the caller then bounds the rows of a call."""
    return attend in (attend_pages_gathered, attend_pages_reference)


def load_pages_backend(name: str) -> AttendPages:
    """The backend called `name`. Raises ImportError where it is not installed or cannot be compiled."""
    return _LOADERS[name]()


def installed_pages_backends(ask: Ask) -> dict[str, AttendPages]:
    """Every backend of this machine that computes `ask`, the best first: what a bench sets side by side."""
    found: dict[str, AttendPages] = {}
    for name, limits in BACKENDS.items():
        if limits.refusal(ask) is None:
            try:
                found[name] = load_pages_backend(name)
            except (ImportError, AttributeError, OSError):
                continue
    return found


def _triton() -> AttendPages:
    from farspan.kernels.paged_decode.triton import attend_pages_triton

    return attend_pages_triton


def _native() -> AttendPages:
    from farspan.kernels.paged_decode.native import load_native

    return load_native()


_LOADERS: Mapping[str, Callable[[], AttendPages]] = {
    "triton": _triton,
    "native": _native,
    "gathered": lambda: attend_pages_gathered,
    "reference": lambda: attend_pages_reference,
}
