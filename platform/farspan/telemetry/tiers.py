"""The tiers of memory a step's report speaks of, by the names people read."""

from __future__ import annotations

from farspan.telemetry.kinds import StepReport

# An emulated tier is always called so.
BESIDE_DEVICE = {
    "dram_bytes": "dram",
    "cxl_bytes": "cxl",
    "emulated_cxl_bytes": "cxl (emulated)",
    "nvme_bytes": "nvme",
}
"""Field of a StepReport -> tier."""


def held_beside(step: StepReport) -> dict[str, int]:
    """Tier -> bytes, of those that hold anything."""
    held = {tier: int(getattr(step, field)) for field, tier in BESIDE_DEVICE.items()}
    return {tier: size for tier, size in held.items() if size > 0}
