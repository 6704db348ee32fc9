"""Pages and states of preempted sequences that wait in another tier of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kv.pages import PagePool
from farspan.memory.tier import Region, Tier

_OWNER = "pages of preempted sequences"


@dataclass(frozen=True, slots=True)
class OffloadedPages:
    """The content of pages, outside of the pool."""

    region: Region
    num_pages: int
    state_bytes: int = 0
    """Bytes of a recurrent state after those of the pages."""


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

    def put(self, pages: Sequence[int], state_B: Tensor | None = None) -> OffloadedPages:
        """Copy pages out, and a recurrent state with them.

        Raises:
            TierError: there is no room, or the tier does not answer.
        """
        content_B = self._pool.storage_PB[list(pages)].view(-1)
        if state_B is not None:
            content_B = torch.cat([content_B, state_B])
        region = self._tier.allocate(content_B.nbytes, _OWNER)
        try:
            self._tier.store(region, content_B).wait()
        except BaseException:
            self._tier.free(region)
            raise
        return OffloadedPages(region, len(pages), 0 if state_B is None else len(state_B))

    def take(self, kept: OffloadedPages, pages: Sequence[int]) -> Tensor:
        """Copy back into held `pages`, as many as there were, and give the room up; the state is returned."""
        assert len(pages) == kept.num_pages, "one page for each that was put"
        size = self._pool.layout.page_bytes
        content_B = self._pool.storage_PB.new_empty(len(pages) * size + kept.state_bytes)
        self._tier.fetch(kept.region, content_B).wait()
        self._pool.storage_PB[list(pages)] = content_B[: len(pages) * size].view(-1, size)
        self.drop(kept)
        return content_B[len(pages) * size :]

    def drop(self, kept: OffloadedPages) -> None:
        """Give the room up."""
        self._tier.free(kept.region)

    def close(self) -> None:
        self._tier.close()
