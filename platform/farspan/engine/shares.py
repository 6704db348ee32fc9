"""Prompts of a batch shared out among engines: what begins alike is computed by one of them, once.

Source: the explicit global prefixes of BatchLLM (Zheng et al. 2024, https://arxiv.org/abs/2412.03594).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from farspan.engine.prompts import Prompt
from farspan.kv.prefix import common_prefix

# So many shares of each engine follow one another, where they are of enough prompts to be computed side by side: who
# ends early takes what the others have not begun.
_SHARES_OF_ENGINE, _SHARE_PROMPTS = 4, 64


def share_out(groups: Sequence[Sequence[Prompt]], num_engines: int) -> list[list[Prompt]]:
    """Every prompt in one share; the largest shares come first, each to be taken by the next engine that is free.

    `groups` are of prompts that begin alike, neighbours having most in common (groups.py). A group stays whole, unless
    it is more than an engine's part of everything: then it is cut into pieces, as large as that allows.
    """
    rows = [_Row.of(group) for group in groups if group]
    num_prompts, num_tokens = (sum(counts) for counts in ([len(r.prompts) for r in rows], [r.total for r in rows]))
    fair = -(-num_tokens // num_engines)
    most = min(fair, max(fair // _SHARES_OF_ENGINE, _SHARE_PROMPTS * num_tokens // max(num_prompts, 1)))
    shares: list[list[Prompt]] = []
    sizes: list[int] = []
    for row in rows:
        for begin, end in row.pieces(fair):
            size = row.num_tokens(begin, end)
            if not shares or sizes[-1] + size > most:
                shares.append([])
                sizes.append(0)
            shares[-1] += row.prompts[begin:end]
            sizes[-1] += size
    largest_first = sorted(range(len(shares)), key=lambda number: -sizes[number])
    return [shares[number] for number in largest_first]


@dataclass(frozen=True, slots=True)
class _Row:
    """Prompts of which each begins with some tokens of the one before it."""

    prompts: Sequence[Prompt]
    common: list[int]
    """How many tokens each begins with that the one before has, too."""
    before: list[int]
    """Tokens that are computed and answered up to each, when all are computed one after the other."""

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> _Row:
        common = [0, *(common_prefix(a.tokens, b.tokens) for a, b in pairwise(prompts))]
        before = [0]
        for prompt, shared in zip(prompts, common, strict=True):
            before.append(before[-1] + len(prompt.tokens) - shared + prompt.params.max_tokens)
        return cls(prompts, common, before)

    @property
    def total(self) -> int:
        return self.before[-1]

    def num_tokens(self, begin: int, end: int) -> int:
        """Of a piece alone: its first prompt finds nothing of the one before it."""
        return self.before[end] - self.before[begin] + self.common[begin]

    def pieces(self, fair: int) -> list[tuple[int, int]]:
        """All prompts in one piece of at most `fair` tokens, or in the fewest; each computes what all begin with."""
        count = -(-self.total // fair)
        start = min(self.common[1:], default=0)
        most = start + -(-(self.total - start) // count)
        found, begin = [], 0
        while begin < len(self.prompts):
            found.append((begin, self._end(begin, most)))
            begin = found[-1][1]
        return found

    def _end(self, begin: int, most: int) -> int:
        end = begin + 1
        while end < len(self.prompts) and self.num_tokens(begin, end + 1) <= most:
            end += 1
        if end == len(self.prompts):
            return end
        # In the last quarter of the largest piece, where neighbours have least in common.
        places = range(max(begin + 1, end - (end - begin) // 4), end + 1)
        return min(places, key=lambda place: (self.common[place], -place))
