"""Compile a C++ kernel on the machine that runs it: one small file without headers of Python or torch, some seconds.
Headers that lie beside it are part of it, and those of all kernels, which lie here.

The library is kept in the user's cache under a name made of all it depends on, and appears there whole. Processes that
want it at the same time wait for one of them, but never beyond a deadline; a dead one's lock is released by the system.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fopenmp-simd", "-pthread", "-Wno-psabi", "-shared", "-fPIC"),
)
# By what torch found on this processor. Part of the library's name: unlike machines may share a folder.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
}
_DEADLINE_S = 120.0


def cache_folder() -> Path:
    """Where compiled libraries of this user are kept; nobody else may put one there. ImportError without a home."""
    try:
        return Path.home() / ".cache" / "farspan"
    except RuntimeError as problem:
        raise ImportError(f"no place for a compiled library: {problem}") from problem


def build_library(folder: Path, source: Path, deadline_s: float = _DEADLINE_S) -> Path:
    """The compiled library, made now or by whoever came first.

    Raises ImportError when there is no compiler, it fails, or the library is not there by the deadline.
    """
    end = time.monotonic() + deadline_s
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise ImportError("no C++ compiler is installed")
    flags = (*_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    parts = [source, *sorted(source.parent.glob("*.h")), *sorted(Path(__file__).parent.glob("*.h"))]
    depends_on = "\0".join([compiler, platform.machine(), *flags]).encode() + b"".join(p.read_bytes() for p in parts)
    key = hashlib.sha256(depends_on).hexdigest()[:16]
    library = folder / f"{source.parent.name}-{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock"), end):
            if not library.exists():
                _compile([compiler, *flags], source, library, end)
    except OSError as problem:
        raise ImportError(f"{folder} cannot be written: {problem}") from problem
    return library


@contextmanager
def _locked(path: Path, end: float) -> Iterator[None]:
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise ImportError(f"another process still compiles {path.stem}") from None
                time.sleep(0.05)
        # Closing the file releases the lock, also when this process dies.
        yield


def _compile(compiler: list[str], source: Path, library: Path, end: float) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as workplace:
        made = Path(workplace) / library.name
        command = [*compiler, str(source), "-o", str(made)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=max(end - time.monotonic(), 0.1)
            )
        except subprocess.TimeoutExpired:
            raise ImportError(f"{compiler[0]} did not finish {source.name} by the deadline") from None
        except subprocess.CalledProcessError as problem:
            raise ImportError(f"{compiler[0]} cannot compile {source.name}: {problem.stderr.strip()[:300]}") from None
        os.replace(made, library)
