"""Pages found again by what they hold: tokens that begin like earlier ones take their pages instead of computing them.

A page is named by a sha256 chain: what its keys and values depend on besides tokens (the scope), the name of the page
before it, its own tokens. A page filled in part is known too, below the page before it; whoever goes on after some of
its tokens gets a copy, because the page itself may still grow.

Where layers form groups, a name stands for one page of each group, and a beginning is there when every group has the
pages that the next token reads: a window needs only the last ones.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from farspan.kv.host_index import Block
from farspan.kv.layout import GONE
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool

# How many pages that follow the same page are compared with a prompt token by token, newest first.
_TAILS_COMPARED = 8


@dataclass(frozen=True, slots=True)
class PrefixScope:
    """What keys and values depend on besides the tokens before them and the model. Only equals share pages."""

    adapter: str = ""
    salt: str = ""
    """A tenant's own: nobody without it can find out, by the time an answer takes, what others asked."""
    positions: str = "counted from 0"
    """The rule that gives a token its position: keys are kept rotated by it."""


OPEN_SCOPE = PrefixScope()


@dataclass(slots=True)
class PrefixChain:
    """The names of the full pages of one growing token list; each is computed once."""

    page_tokens: int
    root: bytes
    names: list[bytes] = field(default_factory=list)
    num_remembered: int = 0
    """Pages of its sequence that were offered to the cache."""

    def name(self, page: int, tokens: Sequence[int]) -> bytes | None:
        """The name of the page at a place of the list; None when the tokens do not fill it."""
        size = self.page_tokens
        while len(self.names) <= page and (len(self.names) + 1) * size <= len(tokens):
            start = len(self.names) * size
            content = array("q", tokens[start : start + size]).tobytes()
            self.names.append(hashlib.sha256(self.before(len(self.names)) + content).digest())
        return self.names[page] if page < len(self.names) else None

    def before(self, page: int) -> bytes:
        """The name of what comes before a page."""
        return self.names[page - 1] if page else self.root

    def block(self, page: int, group: int) -> Block:
        """What one group keeps of a page whose name was asked for, by a name outside of the pool."""
        return Block(_of_group(self.names[page], group), _of_group(self.before(page), group))


@dataclass(frozen=True, slots=True)
class Match:
    """The first `num_tokens` tokens are there: in a table of whole `pages`, the rest at the start of `sources`."""

    pages: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    """One page of each group, or none."""
    num_tokens: int = 0

    @property
    def held(self) -> list[int]:
        """The pages without those that are gone."""
        return [page for page in self.pages if page != GONE]


NO_MATCH = Match()


@dataclass(eq=False, slots=True)
class _Entry:
    """What lies in one page of each group, as far as it is not gone."""

    before: bytes
    tokens: tuple[int, ...]
    name: bytes | None
    """None: not full."""
    pages: tuple[int, ...]
    num_left: int
    """Pages that still hold it."""


class PrefixCache:
    """Finds pages of a pool. It holds none, except those that were pinned: the pool forgets idle ones as it must."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: dict[int, _Entry] = {}
        self._named: dict[bytes, _Entry] = {}
        self._following: dict[bytes, OrderedDict[_Entry, None]] = {}
        self._pins: dict[str, list[int]] = {}
        self.version = 0
        """Another one whenever other names are found."""

    @property
    def names(self) -> list[bytes]:
        """Names of the full pages that are found, the oldest first; a few of them may be gone already."""
        return list(self._named)

    @property
    def num_pinned(self) -> int:
        """Pages that are held for pins alone or with others."""
        return len({page for pages in self._pins.values() for page in pages})

    def chain(self, scope: PrefixScope) -> PrefixChain:
        """The beginning of a token list of this scope."""
        return chain_of(self._pool.layout.fingerprint(), self._pool.layout.page_tokens, scope)

    def match(self, chain: PrefixChain, tokens: Sequence[int], most: int) -> Match:
        """The longest beginning of `tokens[:most]` that is there. Whoever uses it must retain its pages first."""
        size = chain.page_tokens
        found = self._longest(chain, tokens, most)
        done = len(found) * size
        sources, shared = self._best_tail(chain.before(len(found)), tokens[done : min(most, done + size)])
        return Match(tuple(self._table(found)), sources, done + shared)

    def _table(self, found: Sequence[_Entry | None]) -> list[int]:
        """The table of what was found, with the pages that are read by whoever goes on right after it."""
        layout = self._pool.layout
        lost = (GONE,) * layout.num_groups
        pages = [page for entry in found for page in (lost if entry is None else entry.pages)]
        return layout.without_gone(pages, len(found) * layout.page_tokens) if layout.gives_back else pages

    def missing(
        self, chain: PrefixChain, tokens: Sequence[int], most: int, elsewhere: Sequence[Sequence[bool]]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """(place, group) of every page without which `tokens[:most]` is not found as far as it could be; pages there.

        `elsewhere` says for each place in which groups the page could come back.
        """
        layout = self._pool.layout
        found = self._longest(chain, tokens, most, elsewhere)
        first = layout.first_places(len(found) * chain.page_tokens) if layout.gives_back else [0] * layout.num_groups
        wanted: list[tuple[int, int]] = []
        there: list[int] = []
        for place, entry in enumerate(found):
            alive = [False] * layout.num_groups if entry is None else self._alive(entry)
            wanted += [(place, group) for group, here in enumerate(alive) if not here and place >= first[group]]
            there += [] if entry is None else [page for page, here in zip(entry.pages, alive, strict=True) if here]
        return wanted, there

    def restore(self, chain: PrefixChain, tokens: Sequence[int], place: int, pages: Mapping[int, int]) -> None:
        """Let others find held pages of one place, by group, that came back; beside those that are still held."""
        entry = self._named.get(chain.names[place])
        row = [GONE] * self._pool.layout.num_groups
        if entry is not None:
            here = zip(entry.pages, self._alive(entry), strict=True)
            row = [page if alive and self._pool.holders(page) else GONE for page, alive in here]
        if any(row[group] == GONE for group in pages):
            row = [page if page != GONE else pages.get(group, GONE) for group, page in enumerate(row)]
            size = chain.page_tokens
            held = tuple(tokens[place * size : (place + 1) * size])
            self._enter(chain.before(place), held, chain.names[place], tuple(row))

    def _longest(
        self, chain: PrefixChain, tokens: Sequence[int], most: int, elsewhere: Sequence[Sequence[bool]] = ()
    ) -> list[_Entry | None]:
        """What lies at the first places, as many as every group has enough of to go on after them."""
        layout, size = self._pool.layout, chain.page_tokens
        everything = [group for group, kept in enumerate(layout.groups) if kept.reach.span is None]
        found: list[_Entry | None] = []
        # For each place and group, how many places up to it are there without a gap.
        runs = [[0] * layout.num_groups]
        while (len(found) + 1) * size <= most:
            name = chain.name(len(found), tokens)
            entry = self._named.get(name) if name is not None else None
            here = self._alive(entry) if entry is not None else [False] * layout.num_groups
            if len(found) < len(elsewhere):
                here = [ours or theirs for ours, theirs in zip(here, elsewhere[len(found)], strict=True)]
            if not all(here[group] for group in everything):
                break
            found.append(entry)
            runs.append([count + 1 if alive else 0 for count, alive in zip(runs[-1], here, strict=True)])
        while found and not self._enough(runs.pop(), len(found)):
            found.pop()
        return found

    def _enough(self, run: Sequence[int], places: int) -> bool:
        """Whether every group has what is read by whoever goes on after so many places."""
        layout = self._pool.layout
        if not layout.gives_back:
            return True
        first = layout.first_places(places * layout.page_tokens)
        return all(count >= places - place for count, place in zip(run, first, strict=True))

    def remember(
        self, chain: PrefixChain, tokens: Sequence[int], num_computed: int, pages: Sequence[int], *, tail: bool
    ) -> range:
        """Let others find the first `num_computed` tokens of a sequence in its `pages`; `tail`: also a page in part.

        Gives the places of full pages that were not offered before.
        """
        size = chain.page_tokens
        full = num_computed // size
        for place in range(chain.num_remembered, full):
            name = chain.name(place, tokens)
            entry = self._named.get(name) if name is not None else None
            there = 0 if entry is None else sum(self._alive(entry))
            brought = self._at(pages, place)
            # Computed twice at the same time: the one that came first is found.
            if there < len(brought) - brought.count(GONE):
                here = tuple(tokens[place * size : (place + 1) * size])
                self._enter(chain.before(place), here, name, brought)
        new = range(chain.num_remembered, full)
        chain.num_remembered = max(chain.num_remembered, full)
        rest = tuple(tokens[full * size : num_computed])
        if tail and rest:
            self._enter(chain.before(full), rest, None, self._at(pages, full))
        return new

    def pin(self, name: str, chain: PrefixChain, tokens: Sequence[int]) -> int:
        """Hold the whole pages of a beginning under a name until `unpin`; gives the number of tokens in them."""
        self.unpin(name)
        found = self._longest(chain, tokens, len(tokens))
        done = len(found) * chain.page_tokens
        held = {page for page in self._table(found) if page != GONE}
        # Whoever asks for just these tokens computes the last one, and goes on one place earlier.
        alive = {p for entry in found if entry for p, here in zip(entry.pages, self._alive(entry), strict=True) if here}
        held |= alive.intersection(self._table(found[:-1]))
        pages = list(held)
        self._pool.retain(pages, _owner(name))
        self._pins[name] = pages
        return done

    def unpin(self, name: str) -> None:
        """Give up what is held under a name; unknown names are no error."""
        self._pool.free(self._pins.pop(name, []))

    def owned(self) -> Iterator[Owned]:
        """What is pinned: nothing else is held here."""
        for name, pages in self._pins.items():
            yield Owned(_owner(name), pages)

    def _at(self, pages: Sequence[int], place: int) -> tuple[int, ...]:
        size = self._pool.layout.num_groups
        return tuple(pages[place * size : (place + 1) * size])

    def _alive(self, entry: _Entry) -> list[bool]:
        """For each group, whether its page still holds what was entered."""
        here: list[bool] = []
        for page in entry.pages:
            ours = self._entries.get(page) is entry
            if ours and not self._pool.is_findable(page):
                self._forget(page)
                ours = False
            here.append(ours)
        return here

    def _best_tail(self, before: bytes, wanted: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """(pages, how many of their tokens are the wanted ones) of a place that follows `before`."""
        best: tuple[tuple[int, ...], int] = ((), 0)
        for entry in list(islice(reversed(self._following.get(before, {})), _TAILS_COMPARED)):
            if all(self._alive(entry)) and (shared := common_prefix(entry.tokens, wanted)) > best[1]:
                best = entry.pages, shared
        return best

    def _enter(self, before: bytes, tokens: tuple[int, ...], name: bytes | None, pages: tuple[int, ...]) -> None:
        there = [page for page in pages if page != GONE]
        entry = _Entry(before, tokens, name, pages, len(there))
        for page in there:
            self._forget(page)
            self._pool.make_findable(page)
            self._entries[page] = entry
        self._following.setdefault(before, OrderedDict())[entry] = None
        if name is not None:
            self._named[name] = entry
            self.version += 1

    def _forget(self, page: int) -> None:
        entry = self._entries.pop(page, None)
        if entry is None:
            return
        entry.num_left -= 1
        if entry.num_left:
            return
        followers = self._following[entry.before]
        del followers[entry]
        if not followers:
            del self._following[entry.before]
        if entry.name is not None and self._named.get(entry.name) is entry:
            del self._named[entry.name]
            self.version += 1


def chain_of(layout: str, page_tokens: int, scope: PrefixScope) -> PrefixChain:
    """The beginning of a token list of this scope, in pages of the layout with this fingerprint."""
    parts = [layout, scope.adapter, scope.salt, scope.positions]
    return PrefixChain(page_tokens, hashlib.sha256(json.dumps(parts).encode()).digest())


def _owner(name: str) -> str:
    return f"the pin {name}"


def _of_group(name: bytes, group: int) -> bytes:
    """The name of one group's page: of the first group that of the place."""
    return hashlib.sha256(name + group.to_bytes(2, "little")).digest() if group else name


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))
