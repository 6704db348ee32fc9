"""Which layers share a page table: those that keep the same tokens, in groups whose pages have nearly the same size.

Every page of a pool has as many bytes as the largest group needs for `page_tokens` tokens, so that any page may go to
any group. A layer that sees only a window gives the pages behind it back while the sequence goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What one more page table weighs against bytes left empty, as a part of all.
_TABLE_WEIGHT = 0.005


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer sees: `window` tokens, the own one included, or its own `chunk`; none: everything."""

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """The first token that anybody from `position` on sees."""
        if self.window is not None:
            return max(0, position + 1 - self.window)
        return position - position % self.chunk if self.chunk is not None else 0

    @property
    def span(self) -> int | None:
        """Most tokens that one token sees; None: all."""
        return self.window if self.window is not None else self.chunk


EVERYTHING = Reach()


def widest(reaches: Sequence[Reach]) -> Reach:
    """What keeps enough for all of them."""
    if len(set(reaches)) == 1:
        return reaches[0]
    if all(reach.window is not None for reach in reaches):
        return Reach(window=max(reach.window or 0 for reach in reaches))
    return EVERYTHING


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Layers, by number, whose keys of the same tokens lie in one page."""

    layers: tuple[int, ...]
    reach: Reach = EVERYTHING


def group_layers(sizes: Sequence[int], reaches: Sequence[Reach]) -> tuple[PageGroup, ...]:
    """Every layer in one group with layers of its reach. `sizes` are what a token takes in each layer.

    Of all page sizes, the one that leaves least empty, of short sequences and of long ones, and needs few groups.
    """
    kinds = [[n for n, reach in enumerate(reaches) if reach == kind] for kind in dict.fromkeys(reaches)]
    # Of a long sequence, only layers that keep everything count.
    lasting = sum(size for size, reach in zip(sizes, reaches, strict=True) if reach == EVERYTHING)
    best: list[list[int]] = []
    least = float("inf")
    for page in sorted({sum(sizes[n] for n in kind[:count]) for kind in kinds for count in range(1, len(kind) + 1)}):
        if page < max(sizes):
            continue
        groups = [group for kind in kinds for group in _filled(kind, sizes, page)]
        largest = max(sum(sizes[n] for n in group) for group in groups)
        short = len(groups) * largest / sum(sizes)
        num_lasting = sum(reaches[group[0]] == EVERYTHING for group in groups)
        long = num_lasting * largest / lasting if lasting else short
        weight = max(short, long) + len(groups) * _TABLE_WEIGHT
        if weight < least:
            best, least = groups, weight
    return tuple(PageGroup(tuple(group), reaches[group[0]]) for group in best)


def _filled(layers: Sequence[int], sizes: Sequence[int], page: int) -> list[list[int]]:
    """Layers in order, as many in each group as a page takes."""
    groups: list[list[int]] = []
    left = 0
    for layer in layers:
        if sizes[layer] > left:
            groups.append([])
            left = page
        groups[-1].append(layer)
        left -= sizes[layer]
    return groups
