"""Which tensor belongs in which tier. Pure: plain values in, decisions with their reasons out.

Two rules from measurements of CXL memory under an offloaded optimizer (training.md 3.14): what the processor computes
on suffers from latency and stays in local DRAM; what is only streamed does not, and is striped over CXL devices in
proportion to their speed, so that together they are nearly as fast as DRAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_IN_PLACE = ("dram", "cxl")
# Devices slower than this share of the fastest one would hold the others up for less than they add.
_MIN_STRIPE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or a group of tensors, to place. `touches_per_step` counts passes over its bytes in one step."""

    name: str
    nbytes: int
    touches_per_step: float
    computed_on: bool
    """The processor computes on it where it is (optimizer states, master weights); otherwise it is only copied."""
    only: tuple[str, ...] = ()
    """Kinds of tier that may hold it; empty: all."""

    @property
    def traffic_bytes(self) -> float:
        return self.nbytes * self.touches_per_step


@dataclass(frozen=True, slots=True)
class Place:
    """A tier as the policy sees it; speeds as `farspan bench memory` measured them."""

    name: str
    kind: str
    """dram, cxl, nvme or object."""
    capacity_bytes: int
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Where an item goes: (tier, bytes) shares that add up to it, or none where it is refused; and why."""

    item: Item
    shares: tuple[tuple[str, int], ...]
    reason: str

    @property
    def refused(self) -> bool:
        return not self.shares


def place(items: Sequence[Item], places: Sequence[Place]) -> list[Decision]:
    """A decision for every item, in the order given.

    Greedy: first what is computed on, then what is streamed, each by touches per byte, most first. No tier is ever
    given more than its capacity.
    """
    room = {p.name: p.capacity_bytes for p in places}
    order = sorted(items, key=lambda i: (not i.computed_on, -i.touches_per_step, -i.nbytes, i.name))
    decided: dict[int, Decision] = {}
    for item in order:
        allowed = [p for p in places if not item.only or p.kind in item.only]
        decision = _place_computed(item, allowed, room) if item.computed_on else _place_streamed(item, allowed, room)
        for name, nbytes in decision.shares:
            room[name] -= nbytes
        decided[id(item)] = decision
    return [decided[id(item)] for item in items]


def seconds_per_step(decision: Decision, places: Sequence[Place]) -> float:
    """Time the tiers need to move an item's traffic of one step; its shares move at once."""
    speeds = {p.name: p for p in places}
    return max(
        (
            decision.item.touches_per_step * (speeds[name].latency_s + nbytes / speeds[name].bytes_per_s)
            for name, nbytes in decision.shares
        ),
        default=0.0,
    )


def _place_computed(item: Item, places: Sequence[Place], room: dict[str, int]) -> Decision:
    """In one tier the processor can compute in: the one with the lowest latency that has room."""
    candidates = sorted((p for p in places if p.kind in _IN_PLACE), key=lambda p: (p.kind != "dram", p.latency_s))
    for found in candidates:
        if room[found.name] >= item.nbytes:
            why = f"{item.name} is computed on {item.touches_per_step:g} times a step: {found.name}"
            if found.kind == "dram":
                return Decision(item, ((found.name, item.nbytes),), f"{why} has the lowest latency")
            slower = _slower(found, candidates)
            return Decision(item, ((found.name, item.nbytes),), f"{why} is next, local DRAM is full{slower}")
    most = max((room[p.name] for p in candidates), default=0)
    return Decision(
        item,
        (),
        f"{item.name} is computed on and needs {item.nbytes} bytes of DRAM or CXL in one piece, {most} are left at "
        f"most; give more DRAM, or use 8-bit states",
    )


def _slower(found: Place, candidates: Sequence[Place]) -> str:
    dram = next((p for p in candidates if p.kind == "dram"), None)
    return f"; {found.latency_s / dram.latency_s:.1f} times its latency" if dram and dram.latency_s else ""


def _place_streamed(item: Item, places: Sequence[Place], room: dict[str, int]) -> Decision:
    """Striped over CXL first, which keeps DRAM free; then DRAM, then disks, then object stores."""
    for kind in ("cxl", "dram", "nvme", "object"):
        group = [p for p in places if p.kind == kind and room[p.name] > 0]
        shares = _stripe(item.nbytes, group, room)
        if shares:
            over = ", ".join(name for name, _ in shares)
            striped = f"striped over {over} by their speed" if len(shares) > 1 else f"in {over}"
            return Decision(item, shares, f"{item.name} is only streamed: {striped}{_why_not_before(kind, places)}")
    left = sum(room[p.name] for p in places)
    return Decision(
        item,
        (),
        f"{item.name} needs {item.nbytes} bytes of one kind of tier, no kind has that much left ({left} in all); "
        f"add a disk to memory.tiers",
    )


def _why_not_before(kind: str, places: Sequence[Place]) -> str:
    if kind == "cxl":
        return ", which keeps local DRAM for what is computed on"
    present = [k for k in ("cxl", "dram", "nvme") if any(p.kind == k for p in places)]
    full = present[: present.index(kind)] if kind in present else present
    return f", because {' and '.join(full)} cannot hold it" if full else ""


def _stripe(nbytes: int, group: Sequence[Place], room: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """Shares in proportion to speed, each within its tier's room; empty where the group cannot hold it all."""
    fastest = max((p.bytes_per_s for p in group), default=0.0)
    fast = [p for p in group if p.bytes_per_s >= _MIN_STRIPE_SHARE * fastest]
    if sum(room[p.name] for p in fast) < nbytes:
        fast = list(group)
    if sum(room[p.name] for p in fast) < nbytes:
        return ()
    shares: dict[str, int] = dict.fromkeys((p.name for p in fast), 0)
    left, open_places = nbytes, fast
    # Whoever is full drops out, and the rest is shared again.
    while left:
        speed = sum(p.bytes_per_s for p in open_places)
        for p in open_places:
            part = min(int(left * p.bytes_per_s / speed), room[p.name] - shares[p.name])
            shares[p.name] += part
        rest = nbytes - sum(shares.values())
        if rest == left or rest < len(fast):
            _give_rest(rest, fast, shares, room)
            break
        left, open_places = rest, [p for p in open_places if shares[p.name] < room[p.name]]
    return tuple((name, size) for name, size in shares.items() if size)


def _give_rest(rest: int, group: Sequence[Place], shares: dict[str, int], room: dict[str, int]) -> None:
    """The few bytes that rounding left over, to whoever has room."""
    for p in sorted(group, key=lambda p: -p.bytes_per_s):
        part = min(rest, room[p.name] - shares[p.name])
        shares[p.name] += part
        rest -= part
