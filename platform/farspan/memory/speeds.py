"""How fast the tiers a run names are: read from what `farspan bench memory` wrote, or measured the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from farspan.errors import CorruptDataError
from farspan.memory.bench import measure
from farspan.memory.open import parse_tier
from farspan.memory.placement import Place
from farspan.memory.tier import Tier

_MOST_BYTES, _ROUNDS = 64 << 20, 3
# A measurement holds the tensor, what comes back of it, and, where the tier is memory, a region.
_SHARE_OF_LIMIT = 8
_KINDS = {"objects": "object"}


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one tier, in its slower direction."""

    bytes_per_s: float
    latency_s: float


# Of tiers nobody measured: what orders kinds, and makes tiers of one kind alike. No measurement.
_UNKNOWN = {
    "dram": Speed(50e9, 100e-9),
    "cxl": Speed(18e9, 600e-9),
    "nvme": Speed(3e9, 100e-6),
    "object": Speed(0.5e9, 50e-3),
}


def read_speeds(source: str, data: bytes) -> dict[str, Speed]:
    """Name of a tier -> its speed, from the JSON of `farspan bench memory` (`--save`, or `--json`) or of a run.

    Raises:
        CorruptDataError: it is none; the message names `source`.
    """
    try:
        content = json.loads(data)
        rows = content["rows"] if "rows" in content else content["memory"]
        return {row["tier"]: _speed(row) for row in rows if "not_measured" not in row}
    except (ValueError, KeyError, TypeError) as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise CorruptDataError(source, f"is not what `farspan bench memory --json` writes ({reason})") from None


def rows_of(speeds: Mapping[str, Speed]) -> list[dict[str, object]]:
    """What `read_speeds` reads."""
    return [
        {
            "tier": name,
            "read_bytes_per_s": speed.bytes_per_s,
            "write_bytes_per_s": speed.bytes_per_s,
            "read_latency_s": speed.latency_s,
            "write_latency_s": speed.latency_s,
        }
        for name, speed in speeds.items()
    ]


def measure_speed(tier: Tier, device: torch.device, limit_gib: float = 0.0) -> Speed:
    """The speed of a tier as it is used from `device`. With a limit (0: none) it is held to with room to spare.

    Raises:
        TierError: the tier gives back other bytes than were stored.
        TierFullError: it has no room for one byte.
    """
    stats = tier.stats()
    most = min(_MOST_BYTES, (stats.capacity_bytes - stats.used_bytes) // 2)
    if limit_gib > 0:
        most = min(most, int(limit_gib * 2**30) // _SHARE_OF_LIMIT)
    return _speed(measure(tier, device, max(1, most), _ROUNDS))


def place_of(text: str, name: str, speeds: Mapping[str, Speed]) -> Place:
    """The tier that `text` of memory.tiers describes, called `name`, as the policy sees it.

    Its speed is the one known of this very description, or of the tier as the bench calls it, or a usual one.
    """
    kind, where, capacity = parse_tier(text)
    kind = _KINDS.get(kind, kind)
    known = (speeds.get(called) for called in (text, _bench_name(kind, where)))
    speed = next((found for found in known if found is not None), _UNKNOWN[kind])
    return Place(name, kind, capacity, speed.bytes_per_s, speed.latency_s)


def is_place(text: str) -> bool:
    """Whether `text` of memory.tiers describes memory beside the device."""
    kind = text.partition(":")[0]
    return _KINDS.get(kind, kind) in _UNKNOWN


def is_known(text: str, speeds: Mapping[str, Speed]) -> bool:
    """Whether the speed of a described tier was measured."""
    kind, where, _ = parse_tier(text)
    return text in speeds or _bench_name(kind, where) in speeds


def _bench_name(kind: str, where: str) -> str:
    if where == "emulated":
        return f"{kind} (emulated)"
    if where.startswith("node="):
        return f"{kind}{where.removeprefix('node=')}"
    return f"dax:{where}" if kind == "cxl" else kind


def _speed(row: Mapping[str, float]) -> Speed:
    return Speed(
        bytes_per_s=float(min(row["read_bytes_per_s"], row["write_bytes_per_s"])),
        latency_s=float(max(row["read_latency_s"], row["write_latency_s"])),
    )
