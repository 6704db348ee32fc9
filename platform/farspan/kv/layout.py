"""The shape of one KV page, and the fingerprint that decides which workers may exchange pages.

Layers may differ in their numbers of heads and in their head dims. A layer here is one call of attention that keeps
keys: a decoder layer, as a rule.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from farspan.kv.grouping import PageGroup

# In a table, where a page was that no layer of its group will read again. No pool has such a page: reading it fails.
GONE = 2**62


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def token_elements(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One page holds `page_tokens` tokens of every layer of a group, keys then values per layer, contiguous.

    All layers of a page lie together, so that one page is one descriptor of a transfer: few large reads are several
    times faster than many small ones.

    The table of a sequence names, for its first `page_tokens` tokens, one page for each group, then for the next ones:
    place after place, `num_groups` pages each. Pages behind the reach of their group are gone.
    """

    model: str
    """Fingerprint of the weights and config the pages were computed with, of all ranks together."""
    layers: tuple[LayerShape, ...]
    dtype: str
    """Name of a torch type, for example float32."""
    page_tokens: int
    counted_token_bytes: int = 0
    """Bytes of a token that lie elsewhere, in a cache of transformers' own, and are only counted here."""
    state: str = ""
    """Fingerprint of the recurrent state that belongs to a sequence beside its pages; empty: there is none."""
    state_bytes: int = 0
    grouped: tuple[PageGroup, ...] = ()
    """Empty: all layers are one group that keeps everything."""
    num_ranks: int = 1
    """So many ranks have the heads of every page between them; `layers` are those of one rank."""

    @classmethod
    def uniform(
        cls,
        *,
        model: str,
        num_layers: int,
        num_kv_heads: int,
        k_head_dim: int,
        v_head_dim: int,
        dtype: str,
        page_tokens: int,
    ) -> KvLayout:
        """Every layer alike."""
        return cls(model, (LayerShape(num_kv_heads, k_head_dim, v_head_dim),) * num_layers, dtype, page_tokens)

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def groups(self) -> tuple[PageGroup, ...]:
        return self.grouped or (PageGroup(tuple(range(len(self.layers)))),)

    @property
    def num_groups(self) -> int:
        return max(1, len(self.grouped))

    @property
    def gives_back(self) -> bool:
        """Whether pages are gone while a sequence goes on."""
        return any(group.reach.span is not None for group in self.grouped)

    @property
    def layers_of_page(self) -> int:
        """Most layers that lie in one page."""
        return max(len(group.layers) for group in self.groups)

    def group_of(self, layer: int) -> int:
        """The group that a layer belongs to."""
        return next(number for number, group in enumerate(self.groups) if layer in group.layers)

    @property
    def page_elements(self) -> int:
        sizes = [sum(self.layers[layer].token_elements for layer in group.layers) for group in self.groups]
        return self.page_tokens * max(sizes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in the pool."""
        return self.page_elements * self.torch_dtype.itemsize

    @property
    def whole_page_bytes(self) -> int:
        """Bytes of a page on all ranks."""
        return self.page_bytes * self.num_ranks

    @property
    def cost_bytes(self) -> int:
        """Bytes of memory that a held page stands for."""
        return self.page_bytes + self.page_tokens * self.counted_token_bytes

    def num_places(self, num_tokens: int) -> int:
        """Places of a table that names `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def num_pages(self, num_tokens: int) -> int:
        """Length of a table that names `num_tokens` tokens, gone pages included."""
        return self.num_places(num_tokens) * self.num_groups

    def first_places(self, num_tokens: int) -> list[int]:
        """For each group, the first place that the token after `num_tokens` tokens, or a later one, reads.

        That of the last token stays in any case: whatever travels is a page at least.
        """
        last = max(0, num_tokens - 1) // self.page_tokens
        return [min(last, group.reach.first(num_tokens) // self.page_tokens) for group in self.groups]

    def num_gone(self, num_tokens: int) -> int:
        """Pages of such a table that nobody reads any more."""
        places = self.num_places(num_tokens)
        return sum(min(first, places) for first in self.first_places(num_tokens)) if self.gives_back else 0

    def without_gone(self, table: Sequence[int], num_tokens: int) -> list[int]:
        """A table of `num_tokens` computed tokens, or more, in which only what is still read is named."""
        held, first, size = list(table), self.first_places(num_tokens), self.num_groups
        for group, place in enumerate(first):
            end = min(place * size, len(held))
            held[group:end:size] = [GONE] * len(range(group, end, size))
        return held

    def most_pages(self, num_tokens: int, step_tokens: int) -> int:
        """Most pages held at a time by a sequence that computes up to `num_tokens`, at most `step_tokens` at once."""
        places, most = self.num_places(num_tokens), 0
        for group in self.groups:
            span = group.reach.span
            # The window of the first token of a step and the step itself, neither at the edge of a page.
            seen = places if span is None else self.num_places(span - 1 + step_tokens) + 1
            most += min(places, seen)
        return most

    def room_tokens(self, num_pages: int, step_tokens: int, most: int) -> int:
        """The longest sequence, of at most `most` tokens, that so many pages are enough for."""
        return bisect_right(range(1, most + 1), num_pages, key=lambda n: self.most_pages(n, step_tokens))

    @property
    def num_state_pages(self) -> int:
        """Pages that hold the recurrent state of a sequence, on its way to another worker."""
        return -(-self.state_bytes // self.page_bytes) if self.page_bytes else 0

    def num_travelling(self, num_tokens: int) -> int:
        """Pages that another worker needs to go on after `num_tokens` tokens, those of the state last."""
        return self.num_pages(num_tokens) - self.num_gone(num_tokens) + self.num_state_pages

    def fingerprint(self) -> str:
        """Equal on two workers exactly when a page of one means the same on the other."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
