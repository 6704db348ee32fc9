"""Pages of preempted sequences that wait in another tier of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.kv.pages import PagePool
from farspan.memory.tier import Region, Tier

_OWNER = "pages of preempted sequences"


@dataclass(frozen=True, slots=True)
class OffloadedPages:
    """The content of pages, outside of the pool."""

    region: Region
    num_pages: int


class PageOffload:
    """Copies pages out of a pool and back in. Nothing is shared: every copy has one owner, who takes or drops it."""

    def __init__(self, pool: PagePool, tier: Tier) -> None:
        self._pool, self._tier = pool, tier

    @property
    def room_pages(self) -> int:
        """Pages that fit in now, each as a copy of its own."""
        stats = self._tier.stats()
        held = -(-self._pool.layout.page_bytes // self._tier.granularity) * self._tier.granularity
        return (stats.capacity_bytes - stats.used_bytes) // held

    def put(self, pages: Sequence[int]) -> OffloadedPages:
        """Copy pages out.

        Raises:
            TierError: there is no room, or the tier does not answer.
        """
        content_NB = self._pool.storage_PB[list(pages)]
        region = self._tier.allocate(content_NB.nbytes, _OWNER)
        try:
            self._tier.store(region, content_NB).wait()
        except BaseException:
            self._tier.free(region)
            raise
        return OffloadedPages(region, len(pages))

    def take(self, kept: OffloadedPages, pages: Sequence[int]) -> None:
        """Copy back into held `pages`, as many as there were, and give the room up."""
        assert len(pages) == kept.num_pages, "one page for each that was put"
        content_NB = self._pool.storage_PB.new_empty(len(pages), self._pool.layout.page_bytes)
        self._tier.fetch(kept.region, content_NB).wait()
        self._pool.storage_PB[list(pages)] = content_NB
        self.drop(kept)

    def drop(self, kept: OffloadedPages) -> None:
        """Give the room up."""
        self._tier.free(kept.region)

    def close(self) -> None:
        self._tier.close()
