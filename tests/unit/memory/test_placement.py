"""Placement is a function of plain values: never over capacity, everything placed or refused, always with a reason."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from farspan.memory.placement import Decision, Item, Place, place, seconds_per_step

GIB = 1 << 30
DRAM = Place("dram", "dram", 64 * GIB, 80e9, 100e-9)
CXL_A = Place("cxl1", "cxl", 128 * GIB, 20e9, 250e-9)
CXL_B = Place("cxl2", "cxl", 128 * GIB, 20e9, 250e-9)
DISK = Place("nvme", "nvme", 1024 * GIB, 3e9, 80e-6)

items = st.builds(
    Item,
    name=st.sampled_from("abcdef"),
    nbytes=st.integers(1, 1000),
    touches_per_step=st.floats(0, 8),
    computed_on=st.booleans(),
)
places = st.lists(
    st.builds(
        Place,
        name=st.text("pqrst", min_size=1, max_size=6),
        kind=st.sampled_from(["dram", "cxl", "nvme", "object"]),
        capacity_bytes=st.integers(0, 2000),
        bytes_per_s=st.floats(1, 1e12),
        latency_s=st.floats(0, 1),
    ),
    unique_by=lambda p: p.name,
    max_size=5,
)


@given(st.lists(items, max_size=12), places)
@settings(max_examples=500)
def test_no_tier_is_given_more_than_it_has_and_every_item_has_a_decision(items: list[Item], tiers: list[Place]) -> None:
    decisions = place(items, tiers)
    assert [d.item for d in decisions] == items
    kinds = {p.name: p.kind for p in tiers}
    given_bytes = dict.fromkeys(kinds, 0)
    for decision in decisions:
        assert decision.reason
        assert decision.refused or sum(size for _, size in decision.shares) == decision.item.nbytes
        for name, size in decision.shares:
            assert size > 0
            given_bytes[name] += size
        if decision.item.computed_on:
            assert all(kinds[name] in ("dram", "cxl") for name, _ in decision.shares)
            assert len(decision.shares) <= 1
    assert all(given_bytes[p.name] <= p.capacity_bytes for p in tiers)
    room = {p.name: p.capacity_bytes - given_bytes[p.name] for p in tiers}
    for decision in decisions:
        # Whatever was refused would not fit now either.
        if decision.refused and decision.item.computed_on:
            assert all(room[p.name] < decision.item.nbytes for p in tiers if p.kind in ("dram", "cxl"))
        elif decision.refused:
            for kind in ("dram", "cxl", "nvme", "object"):
                assert sum(room[p.name] for p in tiers if p.kind == kind) < decision.item.nbytes


def of(decisions: list[Decision]) -> dict[str, tuple[tuple[str, int], ...]]:
    return {d.item.name: d.shares for d in decisions}


def test_what_the_optimizer_touches_stays_in_dram_and_streams_are_striped_over_cxl() -> None:
    states = Item("moments", 48 * GIB, 2.0, computed_on=True)
    saved = Item("activations", 100 * GIB, 2.0, computed_on=False)
    decisions = place([saved, states], [DRAM, CXL_A, CXL_B, DISK])
    assert of(decisions) == {
        "moments": (("dram", 48 * GIB),),
        "activations": (("cxl1", 50 * GIB), ("cxl2", 50 * GIB)),
    }
    assert "lowest latency" in decisions[1].reason
    assert "striped over cxl1, cxl2" in decisions[0].reason


def test_stripes_follow_measured_speed() -> None:
    slow = Place("cxl2", "cxl", 128 * GIB, 10e9, 250e-9)
    (decision,) = place([Item("activations", 90 * GIB, 2.0, computed_on=False)], [CXL_A, slow])
    assert dict(decision.shares) == pytest.approx({"cxl1": 60 * GIB, "cxl2": 30 * GIB}, abs=2)
    # Both devices end at the same time: that is what striping is for.
    assert seconds_per_step(decision, [CXL_A, slow]) == pytest.approx(2 * (60 * GIB / 20e9 + 250e-9), rel=1e-9)


def test_two_devices_move_a_stream_in_half_the_time_of_one() -> None:
    item = Item("activations", 64 * GIB, 2.0, computed_on=False)
    one, two = ([CXL_A], [CXL_A, CXL_B])
    times = [seconds_per_step(place([item], tiers)[0], tiers) for tiers in (one, two)]
    assert times[0] / times[1] == pytest.approx(2.0, rel=1e-6)


def test_the_most_touched_gets_dram_first() -> None:
    rare, often = Item("rare", 40 * GIB, 0.1, computed_on=True), Item("often", 40 * GIB, 4.0, computed_on=True)
    decisions = place([rare, often], [DRAM, CXL_A])
    assert of(decisions) == {"rare": (("cxl1", 40 * GIB),), "often": (("dram", 40 * GIB),)}
    assert "2.5 times its latency" in decisions[0].reason


def test_a_stream_that_only_a_disk_can_hold_goes_there_and_says_why() -> None:
    (decision,) = place([Item("activations", 400 * GIB, 2.0, computed_on=False)], [DRAM, CXL_A, CXL_B, DISK])
    assert decision.shares == (("nvme", 400 * GIB),)
    assert "cxl and dram cannot hold it" in decision.reason


def test_what_fits_nowhere_is_refused_with_the_way_out() -> None:
    computed, streamed = place(
        [Item("moments", 200 * GIB, 2.0, computed_on=True), Item("saved", 9000 * GIB, 2.0, computed_on=False)],
        [DRAM, CXL_A, DISK],
    )
    assert computed.refused
    assert streamed.refused
    assert "8-bit states" in computed.reason
    assert "memory.tiers" in streamed.reason
