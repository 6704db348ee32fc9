"""Every tier keeps the same contract: bytes come back as they went, capacity holds, owners are named."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from farspan.errors import ConfigError, CorruptDataError, StaleBufferError, TierError, TierFullError
from farspan.memory.dax import DaxTier
from farspan.memory.emulated import EmulatedTier, Shape
from farspan.memory.extents import Extents
from farspan.memory.host import DramTier
from farspan.memory.inplace import InPlaceTier
from farspan.memory.nvme import NvmeTier
from farspan.memory.object_store import ObjectStoreTier
from farspan.memory.open import open_tiers
from farspan.memory.shelf import Shelf
from farspan.memory.striped import StripedTiers
from farspan.memory.tier import Region, Tier
from farspan.storage.door import open_store

CAPACITY = 32 << 20
FAST = Shape(read_bytes_per_s=1e12, write_bytes_per_s=1e12, latency_s=0.0)


def dax_file(folder: Path) -> DaxTier:
    (folder / "dax").write_bytes(b"\0" * CAPACITY)
    return DaxTier(folder / "dax", CAPACITY)


TIERS: dict[str, Callable[[Path], Tier]] = {
    "dram": lambda folder: DramTier(CAPACITY),
    "dax": dax_file,
    "nvme": lambda folder: NvmeTier(folder, CAPACITY),
    "objects": lambda folder: ObjectStoreTier(open_store(str(folder / "objects")), CAPACITY),
    "emulated": lambda folder: EmulatedTier("cxl", "cxl", CAPACITY, FAST),
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    opened = TIERS[request.param](tmp_path)
    yield opened
    opened.close()


def test_two_who_open_one_dax_device_never_get_the_same_bytes(tmp_path: Path) -> None:
    """Processes of one host name the same device: each must find its own part."""
    (tmp_path / "dax").write_bytes(b"\0" * (5 << 20))
    first, second = (DaxTier(tmp_path / "dax", 2 << 20) for _ in range(2))
    regions = [tier.allocate(2 << 20, "test") for tier in (first, second)]
    for value, region in enumerate(regions):
        region.tier.store(region, torch.full((2 << 20,), value, dtype=torch.uint8)).finish()
    assert not first.memory_of(regions[0]).any()
    with pytest.raises(TierError, match="2097152 bytes that no other process has could not be mapped"):
        DaxTier(tmp_path / "dax", 2 << 20)
    for region in regions:
        region.tier.free(region)
        region.tier.close()
    # What was given back can be had again.
    DaxTier(tmp_path / "dax", 2 << 20).close()


SIZES = (1, 511, 4096, 4097, (8 << 20) - 1, (8 << 20) + 4097)


def test_bytes_come_back_as_they_went(tier: Tier) -> None:
    generator = torch.Generator().manual_seed(0)
    for nbytes in SIZES:
        tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        region = tier.allocate(nbytes, "test")
        tier.store(region, tensor).finish()
        back = torch.zeros_like(tensor)
        tier.fetch(region, back).wait()
        assert torch.equal(back, tensor)
        tier.free(region)
    assert tier.stats().stored_bytes == tier.stats().fetched_bytes == sum(SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_any_type_and_shape_comes_back(tier: Tier, dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    region = tier.allocate(tensor.numel() * tensor.element_size(), "test")
    tier.store(region, tensor)
    back = torch.zeros_like(tensor)
    # Not waiting for the store: a region's transfers follow each other by themselves.
    tier.fetch(region, back).wait()
    assert torch.equal(back, tensor)
    tier.free(region)


def test_a_second_store_replaces_the_first(tier: Tier) -> None:
    region = tier.allocate(10_000, "test")
    tier.store(region, torch.zeros(10_000, dtype=torch.uint8))
    tier.store(region, torch.ones(9_999, dtype=torch.uint8))
    back = torch.zeros(9_999, dtype=torch.uint8)
    tier.fetch(region, back).wait()
    assert back.all()
    tier.free(region)


def test_capacity_is_never_exceeded_and_the_refusal_says_what_is_free(tier: Tier) -> None:
    held = tier.allocate(CAPACITY - (1 << 20), "weights")
    with pytest.raises(TierFullError, match="activations asked for") as caught:
        tier.allocate((1 << 20) + 1, "activations")
    assert caught.value.free_bytes >= (1 << 20) - tier.granularity
    assert tier.stats().used_bytes <= CAPACITY
    tier.free(held)
    tier.free(tier.allocate(CAPACITY - (1 << 20), "again"))
    assert tier.stats().used_bytes == 0
    assert tier.stats().peak_bytes >= CAPACITY - (1 << 20)


def test_every_byte_has_an_owner(tier: Tier) -> None:
    a, b = tier.allocate(4096, "optimizer"), tier.allocate(8192, "activations")
    assert tier.stats().owners == {"optimizer": 4096, "activations": 8192}
    tier.free(a)
    assert tier.stats().owners == {"activations": 8192}
    tier.free(b)


def test_a_tier_closed_with_memory_held_names_the_holder() -> None:
    tier = DramTier(CAPACITY)
    tier.allocate(4096, "optimizer")
    with pytest.raises(TierError, match="optimizer 4096 bytes"):
        tier.close()


def test_a_freed_region_is_refused(tier: Tier) -> None:
    region = tier.allocate(100, "test")
    tier.free(region)
    with pytest.raises(StaleBufferError, match="after it was freed"):
        tier.store(region, torch.zeros(1))
    with pytest.raises(StaleBufferError):
        tier.free(region)


def test_more_bytes_than_the_region_holds_are_refused(tier: Tier) -> None:
    region = tier.allocate(100, "test")
    with pytest.raises(TierError, match="101 bytes of a region of 100"):
        tier.store(region, torch.zeros(101, dtype=torch.uint8))
    with pytest.raises(TierError, match="contiguous"):
        tier.store(region, torch.zeros(4, 4).t()[1:])
    tier.free(region)


class Gated(DramTier):
    """Copies only once it is let."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.gate = threading.Event()

    def _write(self, region: Region, raw: torch.Tensor) -> None:
        assert self.gate.wait(60)
        super()._write(region, raw)


def test_a_transfer_that_does_not_end_raises_at_its_deadline_and_keeps_its_memory() -> None:
    tier = Gated(CAPACITY)
    region = tier.allocate(100, "test")
    transfer = tier.store(region, torch.zeros(100, dtype=torch.uint8), deadline_s=0.01)
    with pytest.raises(TierError, match=r"did not end in 0\.01 s"):
        transfer.wait()
    with pytest.raises(TierError, match="did not end"):
        tier.free(region)
    assert tier.stats().used_bytes
    tier.gate.set()
    assert tier.store(region, torch.ones(100, dtype=torch.uint8)).finish() is None
    tier.free(region)
    tier.close()


def test_a_flipped_bit_on_disk_is_found(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY)
    region = tier.allocate(20_000, "test")
    tier.store(region, torch.zeros(20_000, dtype=torch.uint8)).finish()
    with open(f"/proc/self/fd/{tier._file}", "r+b") as file:
        file.seek(12_345)
        file.write(b"\1")
    with pytest.raises(CorruptDataError, match="came back changed"):
        tier.fetch(region, torch.zeros(20_000, dtype=torch.uint8)).wait()
    tier.free(region)
    tier.close()


def test_a_changed_object_is_found(tmp_path: Path) -> None:
    tier = ObjectStoreTier(open_store(str(tmp_path)), CAPACITY)
    region = tier.allocate(3, "test")
    tier.store(region, torch.tensor([1, 2, 3], dtype=torch.uint8)).finish()
    (written,) = tmp_path.iterdir()
    written.write_bytes(bytes([1, 2, 4]))
    with pytest.raises(CorruptDataError, match="came back changed"):
        tier.fetch(region, torch.zeros(3, dtype=torch.uint8)).wait()
    tier.free(region)
    assert list(tmp_path.iterdir()) == []
    tier.close()


def test_nothing_is_left_on_disk_with_a_name(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY)
    assert list(tmp_path.iterdir()) == []
    tier.close()


def test_a_disk_smaller_than_the_capacity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="bytes free"):
        NvmeTier(tmp_path, 1 << 60)


def test_a_disk_that_fills_up_says_so(small_disk: Path) -> None:
    tier = NvmeTier(small_disk, 64 << 10)
    (small_disk / "other").write_bytes(b"\0" * (100 << 10))
    region = tier.allocate(64 << 10, "test")
    with pytest.raises(TierError, match="writing failed"):
        tier.store(region, torch.zeros(64 << 10, dtype=torch.uint8)).finish()
    tier.free(region)
    tier.close()


def test_a_file_system_without_direct_io_is_used_through_the_page_cache_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    real = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    tier = NvmeTier(tmp_path, CAPACITY)
    assert not tier.direct
    assert "refuses O_DIRECT" in caplog.text
    region = tier.allocate(5000, "test")
    tier.store(region, torch.full((5000,), 7, dtype=torch.uint8))
    back = torch.zeros(5000, dtype=torch.uint8)
    tier.fetch(region, back).wait()
    assert (back == 7).all()
    tier.free(region)
    tier.close()


def test_poisoned_memory_is_not_a_number_in_every_floating_type() -> None:
    tier = DramTier(CAPACITY)
    region = tier.allocate(64, "test")
    tier.poison(region)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn):
        assert tier.memory_of(region).view(dtype).float().isnan().all()
    tier.free(region)
    tier.close()


def test_a_poisoned_region_of_a_disk_cannot_be_fetched(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY)
    region = tier.allocate(64, "test")
    tier.store(region, torch.zeros(64, dtype=torch.uint8)).finish()
    tier.poison(region)
    with pytest.raises(TierError, match="nothing is stored"):
        tier.fetch(region, torch.zeros(64, dtype=torch.uint8)).wait()
    tier.free(region)
    tier.close()


def test_an_emulated_tier_takes_the_time_of_its_shape_and_says_that_it_is_emulated() -> None:
    clock = [0.0]

    def pause(seconds: float) -> None:
        clock[0] += seconds

    shape = Shape(read_bytes_per_s=1000.0, write_bytes_per_s=500.0, latency_s=0.25)
    tier = EmulatedTier("cxl", "cxl", CAPACITY, shape, now=lambda: clock[0], pause=pause)
    region = tier.allocate(1000, "test")
    tensor = torch.zeros(1000, dtype=torch.uint8)
    tier.store(region, tensor).finish()
    assert clock[0] == pytest.approx(2.25)
    tier.fetch(region, tensor).finish()
    assert clock[0] == pytest.approx(3.5)
    assert tier.label == tier.stats().tier == "cxl (emulated)"
    tier.free(region)
    tier.close()


def test_memory_of_an_in_place_tier_is_what_was_stored() -> None:
    tier = DramTier(CAPACITY)
    assert isinstance(tier, InPlaceTier)
    region = tier.allocate(100, "test")
    tier.store(region, torch.arange(100, dtype=torch.uint8)).finish()
    assert torch.equal(tier.memory_of(region), torch.arange(100, dtype=torch.uint8))
    tier.free(region)
    tier.close()


def test_a_shelf_keeps_tensors_by_key_and_uses_regions_again(tier: Tier) -> None:
    shelf = Shelf(tier, "pages")
    pages = {key: torch.full((5000,), key, dtype=torch.int32) for key in range(4)}
    for key, page in pages.items():
        shelf.put(key, page)
    used = tier.stats().used_bytes
    shelf.drop(0)
    shelf.put(9, pages[2])
    assert tier.stats().used_bytes == used
    back = torch.zeros(5000, dtype=torch.int32)
    for key, want in ((1, pages[1]), (9, pages[2]), (3, pages[3])):
        shelf.get(key, back).wait()
        assert torch.equal(back, want)
    with pytest.raises(TierError, match="keeps nothing under 0"):
        shelf.get(0, back)
    with pytest.raises(TierError, match="already"):
        shelf.put(1, back)
    shelf.close()
    assert tier.stats().used_bytes == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
@settings(max_examples=200)
def test_extents_never_overlap_and_become_one_hole_again(moves: list[tuple[bool, int]]) -> None:
    extents, taken = Extents(100), []
    for taking, number in moves:
        if taking:
            start = extents.take(number)
            if start is None:
                assert all(size < number for _, size in extents.holes)
            else:
                taken.append((start, number))
        elif taken:
            extents.give(*taken.pop(number % len(taken)))
        cells = sorted([*taken, *extents.holes])
        assert sum(size for _, size in cells) == 100
        assert all(a + size == b for (a, size), (b, _) in pairwise(cells))
    for start, size in taken:
        extents.give(start, size)
    assert extents.holes == ((0, 100),)


def test_tiers_are_opened_by_what_a_user_wrote(tmp_path: Path) -> None:
    texts = ["dram:1GiB", "cxl:emulated:4MiB", f"nvme:{tmp_path}:1MiB", f"objects:{tmp_path}/store:2MiB"]
    tiers = open_tiers(texts, torch.device("cpu"), open_store)
    assert {kind: [t.capacity_bytes for t in found] for kind, found in tiers.items()} == {
        "dram": [1 << 30],
        "cxl": [4 << 20],
        "nvme": [1 << 20],
        "object": [2 << 20],
    }
    assert tiers["cxl"][0].emulated
    for found in tiers.values():
        for tier in found:
            tier.close()


@pytest.mark.parametrize(
    "text", ["dram", "dram:0", "dram:12XB", "ram:1GiB", "device:1GiB", "cxl:node=0:1GiB", "nvme:1GiB"]
)
def test_what_is_no_tier_of_this_machine_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"memory\.tiers"):
        open_tiers([text], torch.device("cpu"), open_store)


def test_striped_tiers_fill_in_proportion_to_their_speed_and_refuse_only_when_all_are_full() -> None:
    tiers = [DramTier(1 << 20, name=f"dram{i}") for i in range(2)]
    striped = StripedTiers(tiers, [3.0, 1.0])
    regions = [striped.allocate(4096, "test") for _ in range(100)]
    used = [tier.stats().used_bytes for tier in tiers]
    assert used[0] / used[1] == pytest.approx(3.0, rel=0.05)
    regions += [striped.allocate(4096, "test") for _ in range(412)]
    with pytest.raises(TierFullError, match="0 of 1048576 are free"):
        striped.allocate(4096, "test")
    for region in regions:
        region.tier.free(region)
    for tier in tiers:
        tier.close()


@pytest.mark.parametrize("make", [dax_file, TIERS["nvme"]], ids=["dax", "nvme"])
def test_a_tier_whose_room_is_in_pieces_is_full_and_says_what_the_largest_piece_is(
    make: Callable[[Path], Tier], tmp_path: Path
) -> None:
    """Whoever keeps idle regions frees them when a tier is full, which joins the pieces."""
    tier = make(tmp_path)
    regions = [tier.allocate(CAPACITY // 4, "test") for _ in range(4)]
    for region in regions[::2]:
        tier.free(region)
    with pytest.raises(TierFullError, match=f"asked for {CAPACITY // 2} bytes, {CAPACITY // 4} of"):
        tier.allocate(CAPACITY // 2, "test")
    for region in regions[1::2]:
        tier.free(region)
    tier.close()


def test_memory_the_host_refuses_is_memory_that_did_not_suffice() -> None:
    tier = DramTier(1 << 60)
    with pytest.raises(MemoryError, match="memory tier dram: 1152921504606846976 bytes for test were refused"):
        tier.allocate(1 << 60, "test")
    tier.close()
