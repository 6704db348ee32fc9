"""A cap on the memory of one training process, so that a plan can be tried for a smaller machine than this one."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_GIB = 2**30


@contextmanager
def memory_limit(device: torch.device, gib: float) -> Iterator[None]:
    """Within the block no more than `gib` GiB can be taken; 0: no limit.

    On CUDA that is all of this process's allocations, on a CPU what it takes beyond what it has now (the kernel's
    count of private writable memory). More raises torch's own error for memory that cannot be had.
    """
    if gib <= 0:
        yield
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * _GIB / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(gib * _GIB), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def data_bytes() -> int:
    """Private writable memory of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no VmData")
