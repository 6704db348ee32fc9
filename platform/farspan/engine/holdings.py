"""The pages of every sequence: found or allocated, filled, let others find them, kept in host memory, given back.

And its recurrent state, where the model has one: in a slot while it runs, in pages on its way from or to elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from farspan.engine.request import SequenceState
from farspan.engine.scheduler import ALWAYS_RECOMPUTE, Costs, Row
from farspan.errors import RequestError, TierError
from farspan.kv.offload import PageOffload
from farspan.kv.pages import PagePool
from farspan.kv.prefix import NO_MATCH, Match, PrefixCache, PrefixChain, PrefixScope
from farspan.kv.states import StatePool, pack_state, unpack_state

# How much the newest iteration counts in the running mean of what a token costs.
_PACE_WEIGHT = 0.1


class Holdings:
    """Who holds which pages of one pool. Without a prefix cache nothing is shared, without offload nothing is kept."""

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache | None,
        offload: PageOffload | None,
        clock: Callable[[], float],
        states: StatePool | None = None,
    ) -> None:
        # Pages alone do not bring a state back.
        assert states is None or prefix is None
        self._states = states
        self._pool, self._prefix, self._offload = pool, prefix, offload
        self._matches: dict[str, Match] = {}
        self._token_s = 0.0
        self._page_s = self._measure(clock)

    @property
    def num_pinned(self) -> int:
        return self._prefix.num_pinned if self._prefix is not None else 0

    def row(self, sequence: SequenceState, step: int) -> Row:
        """What the scheduler sees of a sequence that holds its pages."""
        return self._row(sequence, step, NO_MATCH, self._pool.num_own([*sequence.pages, *sequence.state_pages]))

    def waiting_row(self, sequence: SequenceState, step: int) -> Row:
        """What the scheduler sees of one that waits, with what it would find computed if it were admitted now."""
        if self._prefix is None or not sequence.terms.finds or sequence.pages or sequence.num_computed:
            return self.row(sequence, step)
        chain = self._chain(self._prefix, sequence)
        # The last token is always computed: somebody must give the logits.
        match = self._prefix.match(chain, sequence.tokens, len(sequence.tokens) - 1)
        self._matches[sequence.request_id] = match
        return self._row(sequence, step, match, 0)

    def _row(self, sequence: SequenceState, step: int, match: Match, own: int) -> Row:
        computed = max(sequence.num_computed, match.num_tokens)
        name = None
        if self._prefix is not None and sequence.terms.finds and len(sequence.tokens) - computed > 1:
            name = self._chain(self._prefix, sequence).name(computed // self._pool.layout.page_tokens, sequence.tokens)
        return Row(
            sequence.request_id,
            len(sequence.tokens),
            sequence.num_computed,
            len(sequence.pages),
            num_own=own,
            priority=sequence.terms.priority,
            tenant=sequence.terms.tenant,
            waited=step - sequence.last_step,
            hit_tokens=match.num_tokens,
            hit_pages=len(match.pages),
            hit_idle=sum(self._pool.holders(page) == 0 for page in match.pages),
            next_page=name,
            num_state=self._pool.layout.num_state_pages,
            leaves=sequence.prefill_only,
        )

    def claim(self, sequences: Sequence[SequenceState]) -> None:
        """Hold what the admitted ones find, before anybody's new pages push it out."""
        for sequence in sequences:
            if match := self._matches.get(sequence.request_id):
                self._pool.retain(match.pages)
                sequence.pages = list(match.pages)

    def extend(self, sequence: SequenceState, num_pages: int) -> None:
        """Give a sequence as many pages as were decided."""
        match = self._matches.pop(sequence.request_id, None)
        if match is not None:
            self._begin(sequence, match, num_pages)
        sequence.pages += self._alloc(num_pages - len(sequence.pages))
        if sequence.kept is not None:
            assert self._offload is not None
            kept, sequence.kept = sequence.kept, None
            state_B = self._offload.take(kept, sequence.pages[: kept.num_pages])
            self._restore(sequence, state_B)
        if sequence.state_pages:
            self._restore(sequence, unpack_state(self._pool, sequence.state_pages))
            self._pool.free(sequence.state_pages)
            sequence.state_pages = []

    def _begin(self, sequence: SequenceState, match: Match, num_pages: int) -> None:
        size = self._pool.layout.page_tokens
        whole = len(match.pages) * size
        sequence.num_computed = whole
        if sequence.chain is not None:
            sequence.chain.num_remembered = len(match.pages)
        source = match.source
        if source is not None and self._pool.is_findable(source):
            missing = num_pages - len(sequence.pages)
            if self._pool.holders(source) == 0 and self._pool.num_free <= missing:
                # There is no page for a copy: the page itself is the only one left.
                self._pool.take_over(source)
                sequence.pages.append(source)
            else:
                self._pool.retain([source])
                sequence.pages += self._alloc(missing)
                self._pool.copy(source, sequence.pages[len(match.pages)])
                self._pool.free([source])
            sequence.num_computed = match.num_tokens
        sequence.num_found = max(sequence.num_found, min(sequence.num_computed, sequence.num_prompt))

    def state(self, sequence: SequenceState) -> int | None:
        """Slot of a running sequence's state, for a model that has one."""
        return None if self._states is None else self._states.hold(sequence.request_id)

    def _restore(self, sequence: SequenceState, state_B: Tensor) -> None:
        if self._states is not None:
            self._states.bytes_B(self._states.hold(sequence.request_id)).copy_(state_B)

    def pack(self, sequence: SequenceState) -> None:
        """The state of a sequence that leaves goes into the last of its pages; its slot is free."""
        if self._states is None:
            return
        num_pages = self._pool.layout.num_pages(sequence.num_computed)
        sequence.state_pages = sequence.pages[num_pages:]
        del sequence.pages[num_pages:]
        pack_state(self._states.bytes_B(self._states.hold(sequence.request_id)), self._pool, sequence.state_pages)
        self._states.release(sequence.request_id)

    def shrink(self, sequence: SequenceState, num_pages: int) -> None:
        """Give the pages after the first `num_pages` back, which only wrong guesses needed."""
        self._pool.free(sequence.pages[num_pages:])
        del sequence.pages[num_pages:]

    def forget_matches(self) -> None:
        """What was found for one decision says nothing about the next."""
        self._matches.clear()

    def remember(self, sequence: SequenceState, *, tail: bool) -> None:
        """Let others find what a sequence has computed; `tail`: also its last page, filled in part."""
        if self._prefix is None:
            return
        chain = self._chain(self._prefix, sequence)
        if tail or sequence.num_computed // chain.page_tokens > chain.num_remembered:
            self._prefix.remember(chain, sequence.tokens, sequence.num_computed, sequence.pages, tail=tail)

    def release(self, sequence: SequenceState) -> None:
        """Give everything back."""
        self._pool.free([*sequence.pages, *sequence.state_pages])
        if self._states is not None:
            self._states.release(sequence.request_id)
        sequence.pages, sequence.state_pages, sequence.num_computed = [], [], 0
        if sequence.chain is not None:
            sequence.chain.num_remembered = 0
        if sequence.kept is not None:
            assert self._offload is not None
            kept, sequence.kept = sequence.kept, None
            self._offload.drop(kept)

    def preempt(self, sequence: SequenceState, *, offload: bool) -> None:
        """Give all pages back; with `offload` their content waits in host memory where there is room."""
        computed, kept = sequence.num_computed, None
        if offload and self._offload is not None:
            try:
                pages = sequence.pages[: self._pool.layout.num_pages(computed)]
                kept = self._offload.put(pages, self._state_bytes(sequence))
            except TierError:
                # Then it is computed again, which needs no room.
                kept = None
        self.release(sequence)
        sequence.preemptions += 1
        if kept is not None:
            sequence.kept, sequence.num_computed = kept, computed

    def _state_bytes(self, sequence: SequenceState) -> Tensor | None:
        if self._states is None:
            return None
        if sequence.state_pages:
            return unpack_state(self._pool, sequence.state_pages)
        return self._states.bytes_B(self._states.hold(sequence.request_id))

    def costs(self) -> Costs:
        if self._offload is None:
            return ALWAYS_RECOMPUTE
        return Costs(self._token_s, self._page_s, self._offload.room_pages)

    def learn_pace(self, seconds: float, num_tokens: int) -> None:
        """An iteration computed so many tokens in so long."""
        newest = seconds / num_tokens
        self._token_s = newest if self._token_s == 0 else self._token_s + _PACE_WEIGHT * (newest - self._token_s)

    def pin(self, name: str, tokens: Sequence[int], scope: PrefixScope, most_pages: int) -> int:
        """Hold the pages of a computed beginning until `unpin`; gives the number of tokens held.

        Raises RequestError when more than `most_pages` pages would be pinned: requests could never be answered.
        """
        if self._states is not None:
            raise RequestError(name, "nothing can be pinned for a model that keeps a state beside its pages")
        if self._prefix is None:
            raise RequestError(name, "nothing can be pinned without the prefix cache; set engine.prefix_cache=true")
        held = self._prefix.pin(name, self._prefix.chain(scope), tokens)
        if self._prefix.num_pinned > most_pages:
            self._prefix.unpin(name)
            raise RequestError(name, f"at most {most_pages} pages may be pinned; unpin others or raise engine.kv_bytes")
        return held

    def unpin(self, name: str) -> None:
        if self._prefix is not None:
            self._prefix.unpin(name)

    def _chain(self, prefix: PrefixCache, sequence: SequenceState) -> PrefixChain:
        if sequence.chain is None:
            sequence.chain = prefix.chain(sequence.terms.scope)
        return sequence.chain

    def _alloc(self, count: int) -> list[int]:
        pages = self._pool.alloc(count)
        assert pages is not None, "the scheduler gave away pages that are not there"
        return pages

    def _measure(self, clock: Callable[[], float]) -> float:
        """Seconds to move a page out and back in."""
        pages = self._pool.alloc(1) if self._offload is not None and self._offload.room_pages else None
        if pages is None or self._offload is None:
            return 0.0
        start = clock()
        self._offload.take(self._offload.put(pages), pages)
        self._pool.free(pages)
        return clock() - start
