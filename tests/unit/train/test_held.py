"""What a rank says it holds is what the owners of its tiers gave away."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from farspan.memory.emulated import EmulatedTier
from farspan.memory.host import DramTier
from farspan.memory.nvme import NvmeTier
from farspan.memory.open import CXL_SHAPE
from farspan.train.held import DeviceMemory, Held, held_by

PAGE, CAPACITY = mmap.PAGESIZE, 1 << 24


def test_each_tier_counts_what_was_taken_from_it_and_an_emulated_one_under_its_own_name(tmp_path: Path) -> None:
    dram, other = DramTier(CAPACITY), DramTier(CAPACITY, name="dram2")
    cxl, nvme = EmulatedTier("cxl", "cxl", CAPACITY, CXL_SHAPE), NvmeTier(tmp_path, CAPACITY)
    tiers = [dram, other, cxl, nvme]
    assert held_by(5, tiers, 7) == Held(device=5, dram=7, cxl=0, emulated_cxl=0, nvme=0)
    taken = [tier.allocate(size, "a test") for tier, size in zip(tiers, (1, PAGE + 1, 3 * PAGE, 4096), strict=True)]
    want = Held(device=5, dram=PAGE + 2 * PAGE + 7, cxl=0, emulated_cxl=3 * PAGE, nvme=4096)
    assert held_by(5, tiers, 7) == want
    gone = taken.pop(2)
    gone.tier.free(gone)
    assert held_by(5, tiers, 7) == want._replace(emulated_cxl=0)
    for region in taken:
        region.tier.free(region)
    for tier in tiers:
        tier.close()


def test_on_a_processor_device_memory_is_what_is_resident() -> None:
    memory, size = DeviceMemory(torch.device("cpu")), 64 << 20
    memory.begin()
    before = memory.of_step
    held = torch.ones(size, dtype=torch.uint8)
    # The rest of the process may take some or give it back meanwhile.
    assert abs(memory.of_step - before - held.nbytes) < 0.1 * held.nbytes
