"""The pool of KV pages: who holds which page, and how often each page has changed hands.

Shapes: P pages, S slots (tokens) of a page, G key/value heads, D head dim of keys, C head dim of values,
B bytes of a page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch
import xxhash
from torch import Tensor

from farspan.errors import EngineError
from farspan.kv.layout import GONE, KvLayout
from farspan.kv.ownership import Forgotten, Owned, unbalanced

# Where the content of a page comes from that is all zero.
ZEROS = -1


class PagePool:
    """A fixed number of pages in one block of memory, each free, held (with a count of holders), idle or quarantined.

    An idle page has no holder, but somebody may still ask for its content (kv/prefix.py): it is found until it is
    allocated anew, the one that waits longest first.
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
        self._epochs = self.epochs_P.numpy()
        self._holders = [0] * num_pages
        self._takers = [""] * num_pages
        self._num_shared = 0
        self._quarantined: set[int] = set()
        self._findable: set[int] = set()
        # Oldest first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._free = list(range(num_pages - 1, -1, -1))
        self._keys, self._values = _layer_views(self.storage_PB, layout)
        self._changes: list[tuple[int, int]] | None = None
        self._others_digests: Callable[[Sequence[int]], list[list[int]]] | None = None

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages that `alloc` can give: empty ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages without a holder whose content can still be found."""
        return len(self._idle)

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

    def alloc(self, count: int, owner: str = "") -> list[int] | None:
        """`count` pages with one holder each, all zero, or None (and nothing taken) when there are not enough.

        `owner` is named where a page is never given back.
        """
        if count > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        if pages:
            # First the epoch, then the content: a reader that sees new bytes must also see the new epoch.
            self._epochs[pages] += 1
            # A former owner's NaN would spread through the masked slots of a padded read: 0 * NaN is NaN.
            self._clear(pages)
            if self._changes is not None:
                self._changes += [(page, ZEROS) for page in pages]
        for page in pages:
            self._holders[page] = 1
        self.hand(pages, owner)
        return pages

    def _clear(self, pages: Sequence[int]) -> None:
        if self.device.type == "cpu":
            # By this thread alone: waiting for those of torch takes longer.
            storage_PB = self.storage_PB.numpy()
            for page in pages:
                storage_PB[page].fill(0)
            return
        index = torch.tensor(pages)
        if self.device.type == "cuda":
            # Whoever allocates must not wait for what the device computes.
            index = index.pin_memory().to(self.device, non_blocking=True)
        self.storage_PB.index_fill_(0, index, 0)

    def hand(self, pages: Sequence[int], owner: str) -> None:
        """Somebody else owns held pages from now on, in the place of whoever did."""
        for page in pages:
            self._takers[page] = owner

    def retain(self, pages: Sequence[int], owner: str | None = "") -> None:
        """One more holder for each page, which is held or idle. None: beside the owner who is named already."""
        for page in pages:
            assert self._holders[page] > 0 or page in self._idle, f"page {page} is not held"
            self._idle.pop(page, None)
            self._num_shared += self._holders[page] == 1
            self._holders[page] += 1
        if owner is not None:
            self.hand(pages, owner)

    def free(self, pages: Sequence[int]) -> None:
        """One holder less for each page; without holders, a findable page is idle and every other page free.

        Last page first: of one sequence, the end is allocated anew before the beginning, without which it is useless.
        """
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is not held"
            self._holders[page] -= 1
            self._num_shared -= self._holders[page] == 1
            if self._holders[page] == 0:
                if page in self._findable:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def num_own(self, pages: Sequence[int]) -> int:
        """How many of the pages of one holder nobody else holds; gone ones are nobody's."""
        if self._num_shared:
            return sum(page != GONE and self._holders[page] == 1 for page in pages)
        return len(pages) - pages.count(GONE) if self.layout.gives_back else len(pages)

    def make_findable(self, page: int) -> None:
        """Keep the content of a held page after its last holder, until the page is allocated anew."""
        assert self._holders[page] > 0, f"page {page} is not held"
        self._findable.add(page)

    def is_findable(self, page: int) -> bool:
        """Whether the page still has the content it had when it became findable."""
        return page in self._findable

    def copy(self, source: int, target: int) -> None:
        """Give a held page the content of another."""
        assert self._holders[target] == 1, f"page {target} has {self._holders[target]} holders"
        self.storage_PB[target] = self.storage_PB[source]
        if self._changes is not None:
            self._changes.append((target, source))

    def take_changes(self) -> list[tuple[int, int]]:
        """(page, where its content comes from) of each page that was given content without computing.

        Since the last call, in order; the first call begins to remember.
        """
        changes, self._changes = self._changes or [], []
        return changes

    def mirror(self, changes: Sequence[tuple[int, int]]) -> None:
        """Give pages the content that pages of another pool were given, which decides for this one."""
        for zeros, run in groupby(changes, key=lambda change: change[1] == ZEROS):
            if zeros:
                self.storage_PB[[page for page, _ in run]] = 0
                continue
            for target, source in run:
                self.storage_PB[target] = self.storage_PB[source]

    def take_over(self, page: int, owner: str = "") -> None:
        """Allocate an idle page with the content it has: nobody finds it any more."""
        del self._idle[page]
        self._findable.remove(page)
        self.epochs_P[page] += 1
        self._holders[page] = 1
        self._takers[page] = owner

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._findable.remove(page)
        return page

    def quarantine(self, pages: Sequence[int]) -> None:
        """Take pages with exactly one holder out of use until `release_quarantine`."""
        for page in pages:
            assert self._holders[page] == 1, f"page {page} has {self._holders[page]} holders"
            self._holders[page] = 0
            # Whatever it held may be overwritten at any moment.
            self._findable.discard(page)
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

    def digests(self, pages: Sequence[int]) -> list[int]:
        """Digests of whole pages, those parts included that other ranks hold."""
        own = [self.digest(page) for page in pages]
        if self._others_digests is None or not own:
            return own
        parts = zip(own, *self._others_digests(pages), strict=True)
        return [xxhash.xxh3_64_intdigest(b"".join(part.to_bytes(8, "little") for part in each)) for each in parts]

    def join_digests(self, others: Callable[[Sequence[int]], list[list[int]]]) -> None:
        """From now on pages have parts elsewhere: `others` gives the digests of pages for each rank that holds them."""
        self._others_digests = others

    def check_integrity(self) -> None:
        """Raises EngineError unless every page is in exactly one state."""
        held = {p for p, count in enumerate(self._holders) if count > 0}
        states = [set(self._free), held, set(self._idle), self._quarantined]
        total = len(self._free) + len(held) + len(self._idle) + len(self._quarantined)
        if total != self.num_pages or len(set().union(*states)) != self.num_pages:
            raise EngineError(
                f"KV pages lost or doubly owned: {len(self._free)} free + {len(held)} held + {len(self._idle)} idle + "
                f"{len(self._quarantined)} quarantined is not {self.num_pages}"
            )
        if wrong := (set(self._idle) - self._findable) | (self._findable & (states[0] | self._quarantined)):
            raise EngineError(f"KV page {min(wrong)} is idle without content, or found without a right to it")

    def forgotten(self, owned: Iterable[Owned]) -> list[Forgotten]:
        """Pages with more holders than owners; `owned`: by everybody, what is quarantined included.

        Raises EngineError when somebody owns a page that is not held for him: it may be anybody's next.
        """
        owned = list(owned)
        holders = [count + (page in self._quarantined) for page, count in enumerate(self._holders)]
        over, under = unbalanced(holders, owned)
        if under:
            owners = " and ".join(one.owner for one in owned if under[0] in one.pages)
            raise EngineError(
                f"KV page {under[0]} (epoch {self.epoch(under[0])}) has {holders[under[0]]} holders, and is owned by "
                f"{owners}"
            )
        return [Forgotten(page, self.epoch(page), self._takers[page]) for page in over]


def _layer_views(storage_PB: Tensor, layout: KvLayout) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    flat = storage_PB.view(-1).view(layout.torch_dtype)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for group in layout.groups:
        offset = 0
        for number in group.layers:
            layer = layout.layers[number]
            for views, head_dim in ((keys, layer.k_head_dim), (values, layer.v_head_dim)):
                shape = (storage_PB.shape[0], layout.page_tokens, layer.num_kv_heads, head_dim)
                strides = (layout.page_elements, layer.num_kv_heads * head_dim, head_dim, 1)
                views[number] = flat.as_strided(shape, strides, offset)
                offset += layout.page_tokens * layer.num_kv_heads * head_dim
    return keys, values
