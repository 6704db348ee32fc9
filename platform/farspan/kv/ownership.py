"""Who owns which pages: what everybody says to hold, compared with what the pool counts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A sentence names so many pages; the others are counted.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Owned:
    """Pages that a live owner holds, each once."""

    owner: str
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A page with more holders than there are owners: somebody never gave it back."""

    page: int
    epoch: int
    taker: str
    """Who took it last; empty: nobody said a name."""

    def __str__(self) -> str:
        return f"page {self.page} (epoch {self.epoch}, last taken by {self.taker or 'an owner without a name'})"


def unbalanced(holders: Sequence[int], owned: Iterable[Owned]) -> tuple[list[int], list[int]]:
    """Pages (with more holders than owners, with fewer). `holders`: how many each page has."""
    owners = Counter(page for each in owned for page in each.pages)
    over = [page for page, count in enumerate(holders) if count > owners[page]]
    return over, sorted(page for page, count in owners.items() if count > holders[page])


def told(forgotten: Sequence[Forgotten]) -> str:
    """One sentence about pages that are held for nobody."""
    named = ", ".join(map(str, forgotten[:_NAMED]))
    more = f" and {len(forgotten) - _NAMED} more" if len(forgotten) > _NAMED else ""
    return f"KV pages are held for nobody who is here: {named}{more}"
