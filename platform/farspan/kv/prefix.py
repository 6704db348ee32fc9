"""Pages found again by what they hold: tokens that begin like earlier ones take their pages instead of computing them.

A page is named by a sha256 chain: what its keys and values depend on besides tokens (the scope), the name of the page
before it, its own tokens. A page filled in part is known too, below the page before it; whoever goes on after some of
its tokens gets a copy, because the page itself may still grow.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

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


@dataclass(frozen=True, slots=True)
class Match:
    """The first `num_tokens` tokens are there: in whole `pages`, and the rest of them at the start of `source`."""

    pages: tuple[int, ...] = ()
    source: int | None = None
    num_tokens: int = 0


NO_MATCH = Match()


@dataclass(frozen=True, slots=True)
class _Entry:
    before: bytes
    tokens: tuple[int, ...]
    name: bytes | None
    """None: not full."""


class PrefixCache:
    """Finds pages of a pool. It holds none, except those that were pinned: the pool forgets idle ones as it must."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: dict[int, _Entry] = {}
        self._named: dict[bytes, int] = {}
        self._following: dict[bytes, OrderedDict[int, None]] = {}
        self._pins: dict[str, list[int]] = {}

    @property
    def num_pinned(self) -> int:
        """Pages that are held for pins alone or with others."""
        return len({page for pages in self._pins.values() for page in pages})

    def chain(self, scope: PrefixScope) -> PrefixChain:
        """The beginning of a token list of this scope."""
        parts = [self._pool.layout.fingerprint(), scope.adapter, scope.salt, scope.positions]
        return PrefixChain(self._pool.layout.page_tokens, hashlib.sha256(json.dumps(parts).encode()).digest())

    def match(self, chain: PrefixChain, tokens: Sequence[int], most: int) -> Match:
        """The longest beginning of `tokens[:most]` that is there. Whoever uses it must retain its pages first."""
        size = chain.page_tokens
        pages: list[int] = []
        while (len(pages) + 1) * size <= most:
            page = self._find(chain.name(len(pages), tokens))
            if page is None:
                break
            pages.append(page)
        done = len(pages) * size
        source, shared = self._best_tail(chain.before(len(pages)), tokens[done : min(most, done + size)])
        return Match(tuple(pages), source, done + shared)

    def remember(
        self, chain: PrefixChain, tokens: Sequence[int], num_computed: int, pages: Sequence[int], *, tail: bool
    ) -> None:
        """Let others find the first `num_computed` tokens of a sequence in its `pages`; `tail`: also a page in part."""
        size = chain.page_tokens
        full = num_computed // size
        for place in range(chain.num_remembered, full):
            name = chain.name(place, tokens)
            # Computed twice at the same time: the one that came first is found.
            if self._find(name) is None:
                here = tuple(tokens[place * size : (place + 1) * size])
                self._enter(pages[place], _Entry(chain.before(place), here, name))
        chain.num_remembered = max(chain.num_remembered, full)
        rest = tuple(tokens[full * size : num_computed])
        if tail and rest:
            self._enter(pages[full], _Entry(chain.before(full), rest, None))

    def pin(self, name: str, chain: PrefixChain, tokens: Sequence[int]) -> int:
        """Hold the whole pages of a beginning under a name until `unpin`; gives the number of tokens in them."""
        self.unpin(name)
        pages = list(self.match(chain, tokens, len(tokens)).pages)
        self._pool.retain(pages)
        self._pins[name] = pages
        return len(pages) * chain.page_tokens

    def unpin(self, name: str) -> None:
        """Give up what is held under a name; unknown names are no error."""
        self._pool.free(self._pins.pop(name, []))

    def _find(self, name: bytes | None) -> int | None:
        page = self._named.get(name) if name is not None else None
        if page is not None and not self._pool.is_findable(page):
            self._forget(page)
            return None
        return page

    def _best_tail(self, before: bytes, wanted: Sequence[int]) -> tuple[int | None, int]:
        """(page, how many of its tokens are the wanted ones) of a page that follows `before`."""
        best: tuple[int | None, int] = (None, 0)
        for page in list(islice(reversed(self._following.get(before, {})), _TAILS_COMPARED)):
            if not self._pool.is_findable(page):
                self._forget(page)
                continue
            shared = common_prefix(self._entries[page].tokens, wanted)
            if shared > best[1]:
                best = page, shared
        return best

    def _enter(self, page: int, entry: _Entry) -> None:
        self._forget(page)
        self._pool.make_findable(page)
        self._entries[page] = entry
        self._following.setdefault(entry.before, OrderedDict())[page] = None
        if entry.name is not None:
            self._named[entry.name] = page

    def _forget(self, page: int) -> None:
        entry = self._entries.pop(page, None)
        if entry is None:
            return
        followers = self._following[entry.before]
        del followers[page]
        if not followers:
            del self._following[entry.before]
        if entry.name is not None and self._named.get(entry.name) == page:
            del self._named[entry.name]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))
