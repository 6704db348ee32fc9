"""What the tiers of this machine can do: bandwidth of large transfers and latency of small ones, measured.

A tier is measured through the same calls everybody uses, so its threads, copies and digests are in the figure. What was
fetched is compared with what was stored before anything is timed.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from farspan.errors import TierError
from farspan.memory.dax import DaxTier
from farspan.memory.device import DeviceTier
from farspan.memory.emulated import EmulatedTier
from farspan.memory.host import CxlTier, DramTier
from farspan.memory.numa import find_nodes
from farspan.memory.nvme import NvmeTier
from farspan.memory.open import CXL_SHAPE
from farspan.memory.tier import Tier

logger = logging.getLogger(__name__)

_LARGE_BYTES, _SMALL_BYTES = 256 << 20, 4096
_ROUNDS, _SMALL_ROUNDS = 5, 50
_OWNER = "bench"


def bench_memory(
    large_bytes: int = _LARGE_BYTES, rounds: int = _ROUNDS, folder: Path | None = None
) -> list[dict[str, Any]]:
    """One row per tier found; emulated ones say so. `folder`: on the disk to measure; none: the temporary one.

    A tier that is there but cannot be opened has a row saying why.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="farspan-bench-", dir=folder) as scratch:
        return [_row(name, make, device, large_bytes, rounds) for name, make in _found(device, large_bytes, scratch)]


def measure(tier: Tier, device: torch.device, large_bytes: int, rounds: int) -> dict[str, float]:
    """Bytes per second of transfers of `large_bytes`, and seconds of one of 4 KiB, between `device` and a tier.

    Raises:
        TierError: bytes came back changed, or did not come back.
    """
    large = torch.randint(0, 256, (large_bytes,), dtype=torch.uint8).to(device)
    region = tier.allocate(large_bytes, _OWNER)
    try:
        back = torch.zeros_like(large)
        tier.store(region, large).finish()
        tier.fetch(region, back).finish()
        if not torch.equal(back, large):
            raise TierError(tier.label, "gave back other bytes than were stored; it must not be used")
        write_s = _median(lambda: tier.store(region, large).finish(), rounds)
        read_s = _median(lambda: tier.fetch(region, back).finish(), rounds)
        small = large[:_SMALL_BYTES].clone()
        store_s = _median(lambda: tier.store(region, small).finish(), _SMALL_ROUNDS)
        fetch_s = _median(lambda: tier.fetch(region, small).finish(), _SMALL_ROUNDS)
    finally:
        tier.free(region)
    return {
        "read_bytes_per_s": large_bytes / read_s,
        "write_bytes_per_s": large_bytes / write_s,
        "read_latency_s": fetch_s,
        "write_latency_s": store_s,
    }


def _found(device: torch.device, nbytes: int, scratch: str) -> list[tuple[str, Callable[[], Tier]]]:
    """(name, how to open it) of every tier of this machine, and an emulated CXL one."""
    capacity = nbytes + (4 << 20)
    found: list[tuple[str, Callable[[], Tier]]] = []
    if device.type == "cuda":
        found.append((str(device), lambda: DeviceTier(device, capacity)))
    found.append(("dram", lambda: DramTier(capacity, device=device)))
    for node in find_nodes():
        if node.num_cpus == 0 and node.total_bytes:
            found.append((f"cxl{node.index}", lambda n=node.index: CxlTier(n, capacity, device=device)))  # type: ignore[misc]
    for path in sorted(Path("/dev").glob("dax*.*")):
        found.append((f"dax:{path}", lambda p=path: DaxTier(p, capacity, device=device)))  # type: ignore[misc]
    found.append(("nvme", lambda: NvmeTier(Path(scratch), capacity)))
    found.append(("cxl (emulated)", lambda: EmulatedTier("cxl", "cxl", capacity, CXL_SHAPE)))
    return found


def _row(name: str, make: Callable[[], Tier], device: torch.device, large_bytes: int, rounds: int) -> dict[str, Any]:
    logger.info("%s", name)
    try:
        tier = make()
    except TierError as problem:
        return {"tier": name, "not_measured": problem.reason}
    try:
        # The scratch folder's random name would make every row of a baseline new.
        shown = {"tier": name, "kind": tier.kind, "emulated": tier.emulated, "to": device.type, "bytes": large_bytes}
        if isinstance(tier, NvmeTier):
            shown["page_cache"] = not tier.direct
        return {**shown, **measure(tier, device, large_bytes, rounds)}
    except TierError as problem:
        return {"tier": name, "not_measured": problem.reason}
    finally:
        tier.close()


def _median(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
