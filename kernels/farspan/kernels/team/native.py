"""The team of threads that all compiled kernels of a process share (native.cpp), as an address for their calls."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from farspan.kernels.build import build_library, cache_folder

_SOURCE = Path(__file__).with_name("native.cpp")


@cache
def load_team() -> int:
    """The address of `farspan_team`. Compiles it where this machine has not done so before.

    Raises ImportError where it cannot be made.
    """
    library = load_library(_SOURCE)
    address = ctypes.cast(library.farspan_team, ctypes.c_void_p).value
    assert address is not None, "a function has an address"
    return address


def load_library(source: Path) -> ctypes.CDLL:
    """A compiled kernel. Raises ImportError where it cannot be made or loaded."""
    try:
        return ctypes.CDLL(str(build_library(cache_folder(), source)))
    except OSError as problem:
        raise ImportError(f"the compiled kernel cannot be loaded: {problem}") from problem
