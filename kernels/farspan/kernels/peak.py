"""Peak memory of one call: of this process on the CPU of a Linux machine, or of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes_of(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Most memory `call` held beyond what was held before it; none where the system cannot tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    if not _RESET.exists():
        return None
    # Memory that was freed but kept by the allocator would hide what the call really needs.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
