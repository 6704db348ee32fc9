"""Tensors kept in a tier under names, in regions that are used again: what pages and pools are built on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from torch import Tensor

from farspan.errors import TierError
from farspan.memory.tier import DEADLINE_S, Region, Tier
from farspan.memory.transfer import Transfer


class Shelf:
    """Everything `owner` keeps in one tier, by key."""

    def __init__(self, tier: Tier, owner: str) -> None:
        self.tier, self._owner = tier, owner
        self._regions: dict[Hashable, Region] = {}
        self._idle: defaultdict[int, list[Region]] = defaultdict(list)

    def put(self, key: Hashable, tensor: Tensor, deadline_s: float = DEADLINE_S) -> Transfer:
        """Begin to keep a copy of `tensor` under a key that is free.

        Raises:
            TierError: the key is taken; the tier is full.
        """
        if key in self._regions:
            raise TierError(self.tier.label, f"{self._owner} keeps something under {key!r} already; drop it first")
        nbytes = tensor.numel() * tensor.element_size()
        idle = self._idle[nbytes]
        region = self._regions[key] = idle.pop() if idle else self.tier.allocate(nbytes, self._owner)
        return self.tier.store(region, tensor, deadline_s)

    def get(self, key: Hashable, target: Tensor, deadline_s: float = DEADLINE_S) -> Transfer:
        """Begin to fill `target` with what was put under `key`.

        Raises:
            TierError: nothing is kept under it.
        """
        return self.tier.fetch(self._region(key), target, deadline_s)

    def drop(self, key: Hashable) -> None:
        """Forget what is under `key`; its region is used again for the next tensor of that size."""
        region = self._region(key)
        del self._regions[key]
        self._idle[region.nbytes].append(region)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._regions

    def __len__(self) -> int:
        return len(self._regions)

    def close(self) -> None:
        """Give every region back to the tier."""
        regions = [*self._regions.values(), *(r for idle in self._idle.values() for r in idle)]
        self._regions.clear()
        self._idle.clear()
        for region in regions:
            self.tier.free(region)

    def _region(self, key: Hashable) -> Region:
        if key not in self._regions:
            raise TierError(self.tier.label, f"{self._owner} keeps nothing under {key!r}; put it first")
        return self._regions[key]
