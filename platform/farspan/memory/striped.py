"""Several tiers that share a stream: regions go to whichever would be through with its share first."""

from __future__ import annotations

from collections.abc import Sequence

from farspan.errors import TierFullError
from farspan.memory.tier import Region, Tier


class StripedTiers:
    """Regions over tiers in proportion to their speed, so that together they are as fast as their sum.

    Whole regions are dealt out, not slices of one: a layer's saved tensors are several, and travel side by side.
    """

    def __init__(self, tiers: Sequence[Tier], bytes_per_s: Sequence[float] | None = None) -> None:
        """`bytes_per_s`: as `farspan bench memory` measured them; none: all alike."""
        assert tiers
        self.tiers = list(tiers)
        self._speeds = list(bytes_per_s) if bytes_per_s is not None else [1.0] * len(self.tiers)
        assert len(self._speeds) == len(self.tiers)

    @property
    def label(self) -> str:
        return " + ".join(tier.label for tier in self.tiers)

    def allocate(self, nbytes: int, owner: str) -> Region:
        """
        Raises:
            TierFullError: no tier has room.
        """
        loads = [
            (tier.stats().used_bytes + nbytes) / speed for tier, speed in zip(self.tiers, self._speeds, strict=True)
        ]
        refusals: list[TierFullError] = []
        for _, index in sorted((load, index) for index, load in enumerate(loads)):
            try:
                return self.tiers[index].allocate(nbytes, owner)
            except TierFullError as refusal:
                refusals.append(refusal)
        raise max(refusals, key=lambda refusal: refusal.free_bytes)
