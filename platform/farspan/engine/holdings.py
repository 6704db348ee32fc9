"""The pages of every sequence: found or allocated, filled, let others find them, kept in host memory, given back.

And its recurrent state, where the model has one: in a slot while it runs, in pages on its way from or to elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from farspan.engine.request import SequenceState
from farspan.engine.scheduler import ALWAYS_RECOMPUTE, Costs, Row
from farspan.engine.tables import cut_unread, fill_table, held_pages, needed_pages
from farspan.errors import RequestError, TierError
from farspan.kv.host_traffic import HostTraffic
from farspan.kv.layout import GONE
from farspan.kv.offload import PageOffload
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool
from farspan.kv.prefix import NO_MATCH, Match, PrefixCache, PrefixChain, PrefixScope
from farspan.kv.states import StatePool, pack_state, unpack_state

# How much the newest iteration counts in the running mean of what a token costs.
_PACE_KEPT = 0.9


class Holdings:
    """Who holds which pages of one pool. Without a prefix cache nothing is shared, without offload nothing is kept."""

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache | None,
        offload: PageOffload | None,
        clock: Callable[[], float],
        states: StatePool | None = None,
        step_tokens: int = 1,
        host: HostTraffic | None = None,
    ) -> None:
        """`step_tokens`: most tokens of one sequence in one iteration. `host`: where pages go on after the pool."""
        # Pages alone do not bring a state back.
        assert states is None or prefix is None
        assert host is None or prefix is not None
        self._host = host
        self._states = states
        self._pool, self._prefix, self._offload = pool, prefix, offload
        self._step_tokens = step_tokens
        # Asked for every sequence in every iteration.
        self._num_state, self._gives_back = pool.layout.num_state_pages, pool.layout.gives_back
        self._matches: dict[str, Match] = {}
        self._paced_by_prompts, self._paced_s, self._paced_tokens = False, 0.0, 0.0
        self._page_s = self._measure(clock)

    @property
    def num_pinned(self) -> int:
        return self._prefix.num_pinned if self._prefix is not None else 0

    def row(self, sequence: SequenceState, step: int) -> Row:
        """What the scheduler sees of a sequence that holds its pages."""
        return self._row(sequence, step, NO_MATCH, self._num_own(sequence))

    def _num_own(self, sequence: SequenceState) -> int:
        return self._pool.num_own(sequence.pages) + self._pool.num_own(sequence.state_pages)

    def waiting_row(self, sequence: SequenceState, step: int) -> Row:
        """What the scheduler sees of one that waits, with what it would find computed if it were admitted now."""
        if self._prefix is None or not sequence.terms.finds or sequence.pages or sequence.num_computed:
            return self.row(sequence, step)
        chain = self._chain(self._prefix, sequence)
        # The last token is always computed: somebody must give the logits.
        match = self._prefix.match(chain, sequence.tokens, len(sequence.tokens) - 1)
        self._matches[sequence.request_id] = match
        return self._row(sequence, step, match, 0)

    def seek(self, sequence: SequenceState) -> None:
        """One that waits may find more in host memory than in the pool."""
        if self._prefix is not None and self._host is not None and sequence.terms.finds and not sequence.num_computed:
            self._host.seek(sequence.request_id, self._chain(self._prefix, sequence), sequence.tokens)

    def held_back(self, running: Sequence[SequenceState], waiting: Iterable[SequenceState]) -> set[str]:
        """Which of those that wait should stay out for now, because pages of them are on their way from host memory.

        They are fetched as far ahead as there will be room for whole sequences.
        """
        if self._host is None:
            return set()
        self._host.land()
        held: set[str] = set()
        if not self._host.num_seeking:
            return held
        layout = self._pool.layout
        room = self._pool.num_free + self._host.num_fetching
        room -= sum(layout.num_pages(len(s.tokens)) - len(s.pages) + layout.num_groups for s in running)
        for sequence in waiting:
            room -= self.most_pages(len(sequence.tokens), sequence.prefill_only) - self._num_own(sequence)
            # Without room for it beside those that came first, it must not take theirs.
            beside = bool(held) and not sequence.pages
            if self._host.holds_back(sequence.request_id) if room >= 0 else beside:
                held.add(sequence.request_id)
        return held

    def wait_for_host(self, seconds: float) -> None:
        """Wait for pages on their way from host memory, at most so long."""
        if self._host is not None:
            self._host.wait(seconds)

    @property
    def fetches(self) -> bool:
        """Whether pages may come from host memory."""
        return self._host is not None

    @property
    def num_fetching(self) -> int:
        """Pages held for content on its way from host memory."""
        return 0 if self._host is None else self._host.num_fetching

    def _row(self, sequence: SequenceState, step: int, match: Match, own: int) -> Row:
        computed = max(sequence.num_computed, match.num_tokens)
        name = None
        layout = self._pool.layout
        # Of what comes back from host memory, pages that are gone take no place.
        back = layout.num_gone(sequence.num_computed) if sequence.kept is not None else 0
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
            num_gone=sequence.num_gone,
            hit_pages=len(match.pages) + back,
            hit_gone=match.pages.count(GONE) + back,
            hit_idle=sum(self._pool.holders(page) == 0 for page in match.held),
            next_page=name,
            num_state=self._num_state,
            leaves=sequence.prefill_only,
            most_pages=self.most_pages(len(sequence.tokens), sequence.prefill_only) if self._gives_back else None,
        )

    def most_pages(self, num_tokens: int, leaves: bool) -> int:
        """Most pages held at a time until so many tokens are computed, and the state packed of one that leaves."""
        layout = self._pool.layout
        return layout.most_pages(num_tokens, self._step_tokens) + (self._num_state if leaves else 0)

    def claim(self, sequences: Sequence[SequenceState]) -> None:
        """Hold what the admitted ones find, before anybody's new pages push it out."""
        for sequence in sequences:
            if self._host is not None:
                self._host.forget(sequence.request_id)
            if match := self._matches.get(sequence.request_id):
                self._pool.retain(match.held, owner_of(sequence))
                sequence.pages, sequence.num_gone = array("q", match.pages), match.pages.count(GONE)

    def extend(self, sequence: SequenceState, num_pages: int) -> None:
        """Give a sequence as many pages as were decided."""
        match = self._matches.pop(sequence.request_id, None)
        if match is not None:
            self._begin(sequence, match, num_pages)
        if sequence.kept is not None:
            self._fetch(sequence)
        if num_pages > len(sequence.pages):
            sequence.pages.extend(self._alloc(num_pages - len(sequence.pages), sequence))
        if sequence.state_pages:
            self._restore(sequence, unpack_state(self._pool, sequence.state_pages))
            self._pool.free(sequence.state_pages)
            sequence.state_pages = []
        if sequence.prefill_only:
            # More than its tokens need: it leaves after this iteration, and its state will be packed into them.
            end = self._pool.layout.num_pages(len(sequence.tokens))
            sequence.state_pages = list(sequence.pages[end:])
            del sequence.pages[end:]

    def extend_running(self, sequences: Sequence[SequenceState], num_pages: Sequence[int]) -> bool:
        """Give sequences that go on as many pages; false, and nobody gets any, where there are too few."""
        counts = [most - len(sequence.pages) for sequence, most in zip(sequences, num_pages, strict=True)]
        wanting = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count > 0]
        if not wanting:
            return True
        pages = self._pool.alloc(sum(count for _, count in wanting))
        if pages is None:
            return False
        start = 0
        for sequence, count in wanting:
            given = pages[start : start + count]
            start += count
            self._pool.hand(given, owner_of(sequence))
            sequence.pages.extend(given)
        return True

    def _begin(self, sequence: SequenceState, match: Match, num_pages: int) -> None:
        places = len(match.pages) // self._pool.layout.num_groups
        sequence.num_computed = places * self._pool.layout.page_tokens
        if sequence.chain is not None:
            sequence.chain.num_remembered = places
            if self._host is not None:
                # What is used again is used again there too, and what was lost there is kept anew.
                self._host.keep(sequence.chain, range(places), sequence.pages)
        if match.sources and all(map(self._pool.is_findable, match.sources)):
            sequence.pages.extend(self._copies(match.sources, num_pages - len(sequence.pages), sequence))
            sequence.num_computed = match.num_tokens
        sequence.num_found = max(sequence.num_found, min(sequence.num_computed, sequence.num_prompt))

    def _copies(self, sources: Sequence[int], missing: int, sequence: SequenceState) -> list[int]:
        """Pages with the content of `sources`, of the `missing` ones that are there for the sequence."""
        idle = [page for page in sources if self._pool.holders(page) == 0]
        # Where there are no pages for copies, those that nobody holds are the only ones left.
        taken = idle if self._pool.num_free - len(idle) < missing else []
        for page in taken:
            self._pool.take_over(page, owner_of(sequence))
        copied = [page for page in sources if page not in taken]
        self._pool.retain(copied, owner_of(sequence))
        copies = dict(zip(copied, self._alloc(len(copied), sequence), strict=True))
        for source, page in copies.items():
            self._pool.copy(source, page)
        self._pool.free(copied)
        return [copies.get(page, page) for page in sources]

    def _fetch(self, sequence: SequenceState) -> None:
        """Bring back what waited in host memory."""
        assert self._offload is not None
        assert sequence.kept is not None
        kept, sequence.kept = sequence.kept, None
        pages = self._alloc(kept.num_pages, sequence)
        fill_table(self._pool.layout, sequence, pages)
        self._restore(sequence, self._offload.take(kept, pages))

    def trim(self, sequence: SequenceState) -> None:
        """Give back the pages that no layer of their group will read again."""
        if self._gives_back:
            self._pool.free(cut_unread(self._pool.layout, sequence))

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
        pack_state(self._states.bytes_B(self._states.hold(sequence.request_id)), self._pool, sequence.state_pages)
        self._states.release(sequence.request_id)

    def shrink(self, sequence: SequenceState, num_pages: int) -> None:
        """Give the pages after the first `num_pages` back, which only wrong guesses needed."""
        if len(sequence.pages) > num_pages:
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
            new = self._prefix.remember(chain, sequence.tokens, sequence.num_computed, sequence.pages, tail=tail)
            if self._host is not None:
                self._host.keep(chain, new, sequence.pages)

    def release(self, sequence: SequenceState) -> None:
        """Give everything back."""
        if self._host is not None:
            self._host.forget(sequence.request_id)
        self._pool.free([*held_pages(sequence), *sequence.state_pages])
        if self._states is not None:
            self._states.release(sequence.request_id)
        sequence.pages, sequence.state_pages, sequence.num_computed, sequence.num_gone = array("q"), [], 0, 0
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
                kept = self._offload.put(needed_pages(self._pool.layout, sequence), self._state_bytes(sequence))
            except TierError:
                # Then it is computed again, which needs no room.
                kept = None
        self.release(sequence)
        sequence.preemptions += 1
        if kept is not None:
            sequence.kept, sequence.num_computed = kept, computed
        else:
            self.seek(sequence)

    def _state_bytes(self, sequence: SequenceState) -> Tensor | None:
        if self._states is None:
            return None
        if sequence.state_pages:
            return unpack_state(self._pool, sequence.state_pages)
        return self._states.bytes_B(self._states.hold(sequence.request_id))

    def costs(self) -> Costs:
        if self._offload is None:
            return ALWAYS_RECOMPUTE
        token_s = self._paced_s / self._paced_tokens if self._paced_tokens else 0.0
        return Costs(token_s, self._page_s, self._offload.room_pages)

    def learn_pace(self, seconds: float, sizes: Sequence[int]) -> None:
        """An iteration computed so many tokens of each sequence in so long.

        Computing a preempted sequence again is like a prompt, where a token costs many times less than in decoding:
        once there were iterations of mostly such pieces, of a page at least, only those teach. Long ones count more.
        """
        num_tokens, page = sum(sizes), self._pool.layout.page_tokens
        like_prompts = 2 * sum(size for size in sizes if size >= page) > num_tokens
        if self._paced_by_prompts and not like_prompts:
            return
        if like_prompts and not self._paced_by_prompts:
            self._paced_by_prompts, self._paced_s, self._paced_tokens = True, 0.0, 0.0
        self._paced_s = _PACE_KEPT * self._paced_s + seconds
        self._paced_tokens = _PACE_KEPT * self._paced_tokens + num_tokens

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

    def owned(self, sequences: Iterable[SequenceState]) -> Iterator[Owned]:
        """What these sequences hold, what is pinned, and what is fetched from host memory."""
        for sequence in sequences:
            yield Owned(owner_of(sequence), [*held_pages(sequence), *sequence.state_pages])
        for holder in (self._prefix, self._host):
            if holder is not None:
                yield from holder.owned()

    def _chain(self, prefix: PrefixCache, sequence: SequenceState) -> PrefixChain:
        if sequence.chain is None:
            sequence.chain = prefix.chain(sequence.terms.scope)
        return sequence.chain

    def _alloc(self, count: int, sequence: SequenceState) -> list[int]:
        pages = self._pool.alloc(count, owner_of(sequence))
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


def owner_of(sequence: SequenceState) -> str:
    """By what name its pages are known."""
    return f"request {sequence.request_id}"
