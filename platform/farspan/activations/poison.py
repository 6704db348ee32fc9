"""Checks that find buffers used again too early: what the offload's debug mode adds.

Each costs a pass over the bytes and a wait for the copy, which is why they are not always on.
"""

from __future__ import annotations

from torch import Tensor

from farspan.errors import StaleBufferError
from farspan.memory.inplace import InPlaceTier, memory_at
from farspan.memory.nvme import digest_of
from farspan.memory.tier import Region

POISON = 0xFF


def digest(raw: Tensor) -> int:
    """Of 1-D bytes on any device; waits for whatever computes them."""
    return digest_of(raw.cpu())


def refuse_changed(raw: Tensor, stored: int, what: str) -> None:
    """
    Raises:
        StaleBufferError: `raw` are not the bytes whose digest was taken when they were stored.
    """
    if digest(raw) != stored:
        poisoned = float((raw == POISON).float().mean())
        raise StaleBufferError(
            f"{what}: backward got other bytes than forward saved ({poisoned:.0%} of them poison); a buffer was used "
            f"again before its reader or writer was done"
        )


def refuse_busy(region: Region) -> None:
    """
    Raises:
        StaleBufferError: a transfer of this region is not over.
    """
    if not region.last.done():
        raise StaleBufferError(
            f"a buffer of {region.owner} in {region.tier.label} was returned while a copy of it was under way"
        )


def refuse_written(region: Region) -> None:
    """
    Raises:
        StaleBufferError: an idle buffer no longer holds the poison it was filled with.
    """
    if isinstance(region.tier, InPlaceTier) and not bool((memory_at(region) == POISON).all()):
        raise StaleBufferError(
            f"somebody wrote into an idle buffer of {region.owner} in {region.tier.label}: a copy outlived its buffer"
        )
