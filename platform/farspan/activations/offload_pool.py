"""Buffers of one tier that are used again from step to step.

With `poison`, a buffer that comes back is filled with NaN at once, and must still be filled with it when it is taken
again: a reader that was left over reads NaN, and a writer that was left over is seen.
"""

from __future__ import annotations

from farspan.activations.poison import refuse_busy, refuse_written
from farspan.errors import StaleBufferError, TierFullError
from farspan.memory.tier import Allocator, Region

# A larger buffer is taken for a smaller tensor only up to this factor: the rest of it is wasted.
_MAX_WASTE = 1.25


class BufferPool:
    """Regions `owner` holds in a tier: some in use, some idle. Not thread-safe; its user locks."""

    def __init__(self, tier: Allocator, owner: str, *, poison: bool = False) -> None:
        self.tier, self._owner, self._poison = tier, owner, poison
        self._idle: list[Region] = []
        self.num_taken = 0

    def take(self, nbytes: int) -> Region:
        """A buffer of at least `nbytes`.

        Raises:
            TierFullError: the tier is full, even after every idle buffer was freed.
            StaleBufferError: somebody wrote into an idle buffer (only with poison).
        """
        fitting = [r for r in self._idle if nbytes <= r.nbytes <= _MAX_WASTE * nbytes]
        if fitting:
            region = min(fitting, key=lambda r: r.nbytes)
            if self._poison:
                refuse_written(region)
            self._idle.remove(region)
        else:
            region = self._allocate(nbytes)
        self.num_taken += 1
        return region

    def give(self, region: Region) -> None:
        """A buffer is idle again. Transfers of one region follow each other, so the last one may still be under way.

        Raises:
            StaleBufferError: it is (only with poison, where every transfer is over before its buffer comes back), or
                it came back before.
        """
        if region in self._idle:
            raise StaleBufferError(f"a buffer of {self._owner} in {self.tier.label} was returned twice")
        self.num_taken -= 1
        self._idle.append(region)
        if self._poison:
            refuse_busy(region)
            region.tier.poison(region)

    def close(self) -> None:
        """Free what is idle; what is still taken stays held, under its owner's name."""
        while self._idle:
            region = self._idle.pop()
            region.tier.free(region)

    def _allocate(self, nbytes: int) -> Region:
        try:
            return self.tier.allocate(nbytes, self._owner)
        except TierFullError:
            self.close()
            return self.tier.allocate(nbytes, self._owner)
