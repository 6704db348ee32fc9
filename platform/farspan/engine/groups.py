"""Prompts that are all known beforehand, ordered so that what they begin with in common is computed once.

Source: the explicit global prefixes of BatchLLM (Zheng et al. 2024, https://arxiv.org/abs/2412.03594).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from farspan.kv.prefix import common_prefix


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Prompts, by number, that begin with the same `num_shared` tokens; neighbours have most in common."""

    num_shared: int
    members: tuple[int, ...]

    @property
    def num_saved(self) -> int:
        """Tokens that need not be computed when the group shares its beginning."""
        return self.num_shared * (len(self.members) - 1)


def group_by_prefix(
    prompts: Sequence[Sequence[int]], num_answered: Sequence[int] | None = None, least_tokens: int = 1
) -> list[PrefixGroup]:
    """All prompts in disjoint groups, each of all that begin with some tokens or of one prompt, that save the most.

    `num_answered` is how many tokens each may answer: groups that mostly decode come first, so that the prompts of
    the later ones fill the iterations in which those decode. Beginnings under `least_tokens` are not worth a group.
    """
    order = sorted(range(len(prompts)), key=lambda number: list(prompts[number]))
    groups = _best_groups(order, [common_prefix(prompts[a], prompts[b]) for a, b in pairwise(order)], least_tokens)
    if num_answered is None:
        return groups

    def decode_share(group: PrefixGroup) -> float:
        computed = sum(len(prompts[member]) for member in group.members) - group.num_saved
        return sum(num_answered[member] for member in group.members) / max(computed, 1)

    return sorted(groups, key=decode_share, reverse=True)


@dataclass(slots=True)
class _Node:
    """Neighbours that share `depth` tokens: the groups chosen among those on it so far, and what they save."""

    depth: int
    left: int
    chosen: list[PrefixGroup]
    saved: int = 0


def _best_groups(order: Sequence[int], common: Sequence[int], least_tokens: int) -> list[PrefixGroup]:
    """One walk over the prefix tree, children before parents: a node is one group, or what is best below it."""
    stack = [_Node(0, 0, [])]
    for place, number in enumerate(order):
        depth = common[place - 1] if place else 0
        left = place
        carried: list[PrefixGroup] = []
        saved = 0
        while stack[-1].depth > depth:
            node = stack.pop()
            node.chosen += carried
            node.saved += saved
            carried, saved, left = *_close(node, order[node.left : place], least_tokens), node.left
        if stack[-1].depth < depth:
            # What was closed lies below the new node; so does the prompt before this one.
            left = left if carried else place - 1
            inner = carried or [stack[-1].chosen.pop()]
            stack.append(_Node(depth, left, inner, saved))
        else:
            stack[-1].chosen += carried
            stack[-1].saved += saved
        stack[-1].chosen.append(PrefixGroup(0, (number,)))
    carried, saved = [], 0
    while stack:
        node = stack.pop()
        node.chosen += carried
        node.saved += saved
        carried, saved = _close(node, order[node.left :], least_tokens)
    return carried


def _close(node: _Node, members: Sequence[int], least_tokens: int) -> tuple[list[PrefixGroup], int]:
    whole = PrefixGroup(node.depth, tuple(members))
    if node.depth >= least_tokens and whole.num_saved > node.saved:
        return [whole], whole.num_saved
    return node.chosen, node.saved
