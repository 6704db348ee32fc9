"""The page table of one sequence: which of its pages are there, and which no layer will read again."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from farspan.engine.request import SequenceState
from farspan.kv.layout import GONE, KvLayout


def held_pages(sequence: SequenceState) -> list[int]:
    """The pages of its table that are not gone."""
    return [page for page in sequence.pages if page != GONE] if sequence.num_gone else list(sequence.pages)


def needed_pages(layout: KvLayout, sequence: SequenceState) -> list[int]:
    """The pages of what is computed, without those that only a guess or the next tokens would fill."""
    return [page for page in sequence.pages[: layout.num_pages(sequence.num_computed)] if page != GONE]


def lasting_pages(layout: KvLayout, sequence: SequenceState) -> list[int]:
    """The first of the pages that will be needed after its prompt: those that are full by now."""
    num_full = min(sequence.num_computed, sequence.num_prompt) // layout.page_tokens
    table = sequence.pages[: num_full * layout.num_groups]
    return [page for page in layout.without_gone(table, sequence.num_prompt) if page != GONE]


def fill_table(layout: KvLayout, sequence: SequenceState, pages: Sequence[int]) -> None:
    """The table of a sequence whose needed pages came from elsewhere."""
    table = layout.without_gone([0] * layout.num_pages(sequence.num_computed), sequence.num_computed)
    arrived = iter(pages)
    sequence.pages = array("q", (GONE if page == GONE else next(arrived) for page in table))
    sequence.num_gone = len(table) - len(pages)


def cut_unread(layout: KvLayout, sequence: SequenceState) -> list[int]:
    """Take the pages out of a table that no layer of their group will read again, for the caller to free."""
    size, over = layout.num_groups, list[int]()
    for group, first in enumerate(layout.first_places(sequence.num_computed)):
        place = first - 1
        # The last one that is gone already ends the walk.
        while place >= 0 and sequence.pages[place * size + group] != GONE:
            over.append(sequence.pages[place * size + group])
            sequence.pages[place * size + group] = GONE
            place -= 1
    sequence.num_gone += len(over)
    return over
