"""The pool of KV pages: who holds which page, and how often each page has changed hands.

Shapes: P pages, S slots (tokens) of a page, G key/value heads, D head dim of keys, C head dim of values,
B bytes of a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from farspan.errors import EngineError
from farspan.kv.layout import KvLayout


class PagePool:
    """A fixed number of pages in one block of memory, each free, held (with a count of holders) or quarantined.

    A quarantined page may still be written by a transfer that nobody waits for any more: it is nobody's until the
    transport says that the transfer is over.
    """

    def __init__(
        self, layout: KvLayout, kv_bytes: int, device: torch.device | None = None, most_pages: int | None = None
    ) -> None:
        """At most `most_pages`, which a layout without layers needs: its pages take no memory.

        Raises EngineError when not even one page fits into `kv_bytes`.
        """
        fitting = kv_bytes // layout.cost_bytes if layout.cost_bytes else most_pages
        assert fitting is not None, "pages without content are counted by the caller"
        num_pages = fitting if most_pages is None else min(fitting, most_pages)
        if num_pages < 1:
            raise EngineError(
                f"engine.kv_bytes: must hold at least one page of {layout.cost_bytes} bytes, got {kv_bytes}; "
                f"use for example engine.kv_bytes={256 * layout.cost_bytes}"
            )
        self.layout = layout
        self.device = device or torch.device("cpu")
        self.storage_PB = torch.zeros(num_pages, layout.page_bytes, dtype=torch.uint8, device=self.device)
        # On the CPU whatever the device is: transports read this table remotely, next to the pages.
        self.epochs_P = torch.zeros(num_pages, dtype=torch.int64)
        self._holders = [0] * num_pages
        self._quarantined: set[int] = set()
        self._free = list(range(num_pages - 1, -1, -1))
        self._keys, self._values = _layer_views(self.storage_PB, layout)

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    @property
    def num_held(self) -> int:
        return sum(count > 0 for count in self._holders)

    def keys_PSGD(self, layer: int) -> Tensor:
        """View of the keys of one layer in every page."""
        return self._keys[layer]

    def values_PSGC(self, layer: int) -> Tensor:
        """View of the values of one layer in every page."""
        return self._values[layer]

    def alloc(self, count: int) -> list[int] | None:
        """`count` pages with one holder each, all zero, or None (and nothing taken) when there are not enough."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        if pages:
            # First the epoch, then the content: a reader that sees new bytes must also see the new epoch.
            self.epochs_P[pages] += 1
            # A former owner's NaN would spread through the masked slots of a padded read: 0 * NaN is NaN.
            self.storage_PB[pages] = 0
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is not held"
            self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder less for each page; a page without holders is free again."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is not held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def quarantine(self, pages: Sequence[int]) -> None:
        """Take pages with exactly one holder out of use until `release_quarantine`."""
        for page in pages:
            assert self._holders[page] == 1, f"page {page} has {self._holders[page]} holders"
            self._holders[page] = 0
            self._quarantined.add(page)

    def release_quarantine(self, pages: Sequence[int]) -> None:
        """Nothing can write these pages any more: they are free."""
        for page in pages:
            self._quarantined.remove(page)
            self._free.append(page)

    def epoch(self, page: int) -> int:
        return int(self.epochs_P[page])

    def digest(self, page: int) -> int:
        """64-bit xxh3 of the page's bytes."""
        return xxhash.xxh3_64_intdigest(self.storage_PB[page].cpu().numpy().data)

    def check_integrity(self) -> None:
        """Raises EngineError unless every page is in exactly one state."""
        states = [set(self._free), {p for p, count in enumerate(self._holders) if count > 0}, self._quarantined]
        total = len(self._free) + len(states[1]) + len(states[2])
        if total != self.num_pages or len(set().union(*states)) != self.num_pages:
            raise EngineError(
                f"KV pages lost or doubly owned: {len(self._free)} free + {len(states[1])} held + "
                f"{len(states[2])} quarantined is not {self.num_pages}"
            )


def _layer_views(storage_PB: Tensor, layout: KvLayout) -> tuple[list[Tensor], list[Tensor]]:
    flat = storage_PB.view(-1).view(layout.torch_dtype)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    offset = 0
    for layer in layout.layers:
        for views, head_dim in ((keys, layer.k_head_dim), (values, layer.v_head_dim)):
            shape = (storage_PB.shape[0], layout.page_tokens, layer.num_kv_heads, head_dim)
            strides = (layout.page_elements, layer.num_kv_heads * head_dim, head_dim, 1)
            views.append(flat.as_strided(shape, strides, offset))
            offset += layout.page_tokens * layer.num_kv_heads * head_dim
    return keys, values
