"""Several tiers that share a stream: regions go to whichever would be through with its share first."""

from __future__ import annotations

from collections.abc import Sequence

from farspan.errors import TierFullError
from farspan.memory.tier import Region, Tier


class StripedTiers:
    """Regions over tiers in proportion to their speed, so that together they are as fast as their sum.

    Whole regions are dealt out, not slices of one: a layer's saved tensors are several, and travel side by side.
    """

    def __init__(
        self, tiers: Sequence[Tier], shares: Sequence[float] | None = None, after: Sequence[Tier] = ()
    ) -> None:
        """`shares`: what each tier gets of an owner's bytes, or its speed; none: all alike.

        `after`: tiers for what none of these has room for, in this order.
        """
        assert tiers
        self.tiers, self._after = list(tiers), list(after)
        self.shares = list(shares) if shares is not None else [1.0] * len(self.tiers)
        assert len(self.shares) == len(self.tiers)

    @property
    def label(self) -> str:
        return " + ".join(tier.label for tier in self.tiers)

    def allocate(self, nbytes: int, owner: str) -> Region:
        """
        Raises:
            TierFullError: no tier has room.
        """
        # Others may lie in the same tiers: what counts is what this owner has there.
        loads = [
            (tier.stats().owners.get(owner, 0) + nbytes) / share
            for tier, share in zip(self.tiers, self.shares, strict=True)
        ]
        refusals: list[TierFullError] = []
        order = sorted(range(len(loads)), key=loads.__getitem__)
        for tier in (*(self.tiers[index] for index in order), *self._after):
            try:
                return tier.allocate(nbytes, owner)
            except TierFullError as refusal:
                refusals.append(refusal)
        raise max(refusals, key=lambda refusal: refusal.free_bytes)
