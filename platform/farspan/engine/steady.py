"""Decode while nobody comes or goes: what does not change from one step to the next is looked at once.

One step ahead of what was looked at, where that is asked for: the next step is launched first, and tokens are looked at
while the device computes it. Whoever ends with a token, or is cancelled, has then got one too many, which is dropped.
What that step writes lies in pages that are held for it until it is over, whoever else gave them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from farspan.engine.advance import Advanced, End, Ends, accept
from farspan.engine.ahead import Course, Launched
from farspan.engine.fairness import Service, crowds_out
from farspan.engine.holdings import Holdings
from farspan.engine.lowrank import BASE
from farspan.engine.request import Event, SequenceState, TokenEvent
from farspan.engine.runner import Piece, Runner
from farspan.engine.sampler import UNSOUND
from farspan.engine.scheduler import Limits
from farspan.kv.ownership import Owned
from farspan.kv.pages import PagePool


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences that decode side by side, as they were in front of their first step."""

    sequences: list[SequenceState]
    ends: list[End]
    past_N: np.ndarray
    least_left: int
    """Tokens until the first of them ends in any case."""
    course: Course


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step whose tokens nobody has looked at."""

    rows: _Rows
    launched: Launched
    held: list[int]
    """Pages it writes to, held for it."""


class Steady:
    """Steps of one engine in which every running sequence gets a token, by the graphs of its runner."""

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        holdings: Holdings,
        service: Service,
        ends: Ends,
        settle: Callable[[Advanced], list[Event]],
        clock: Callable[[], float],
        *,
        ahead: bool,
    ) -> None:
        """`settle` takes who ended or failed out of what runs. `ahead`: launch a step before the last is looked at."""
        self._runner, self._pool, self._holdings, self._service = runner, pool, holdings, service
        self._ends, self._settle, self._clock, self._ahead = ends, settle, clock, ahead
        self._rows: _Rows | None = None
        self._flight: _Flight | None = None

    def iterate(
        self,
        running: Sequence[SequenceState],
        waiting: Sequence[SequenceState],
        limits: Limits,
        step: int,
        events: list[Event],
    ) -> list[Event] | None:
        """The iteration in which nobody comes or goes, with `events` before it; none where it is another one.

        What the last one was ahead of is among `events` then.
        """
        if not (self._is_due(running, waiting, limits) and self.goes_on(running)):
            events += self.land(running, step)
        # Whoever ended with what has landed is gone.
        if not self._is_due(running, waiting, limits):
            return None
        started, num_running = self._clock(), len(running)
        found = self.step(running, step)
        if found is None:
            return None
        self._holdings.learn_pace(self._clock() - started, [1] * num_running)
        return [*events, *found]

    def _is_due(self, running: Sequence[SequenceState], waiting: Sequence[SequenceState], limits: Limits) -> bool:
        """Whether the scheduler could only give every running sequence its next token, if all of them decode."""
        most = len(running)
        if not most or self._holdings.num_fetching:
            return False
        if most > limits.max_batch_tokens or (limits.decode_tokens is not None and most > limits.decode_tokens):
            return False
        if not waiting:
            return True
        # Who waits stays out while everybody stays in.
        full = most >= limits.max_sequences and not self._holdings.fetches
        lowest = running[-1].terms.priority
        if not full or any(sequence.terms.priority > lowest for sequence in waiting):
            return False
        return not crowds_out([s.terms.tenant for s in running], {s.terms.tenant for s in waiting})

    def goes_on(self, running: Sequence[SequenceState]) -> bool:
        """Whether the sequences are those of the last step, and nothing else was computed since."""
        return self._rows is not None and self._rows.sequences == running and self._rows.course.holds

    def step(self, running: Sequence[SequenceState], step: int) -> list[Event] | None:
        """One token of each; none, and nothing happened, where they are not all plain or have not pages enough.

        If they do not go on from the last step, `land` must have been called.
        """
        flight = self._flight
        if flight is None:
            if self._rows is None:
                self._rows = self._begin(running)
            flight = self._launch(ahead=False)
            if flight is None:
                self._rows = None
                return None
        self._flight = self._launch(ahead=True) if self._ahead else None
        events = self._collect(flight, running, step)
        if not running:
            # Nobody would ask for another step.
            events += self.land(running, step)
        return events

    def land(self, running: Sequence[SequenceState], step: int) -> list[Event]:
        """The end of a course: the tokens of what was launched ahead, for those who are still here."""
        flight, self._flight, self._rows = self._flight, None, None
        return [] if flight is None else self._collect(flight, running, step)

    def owned(self) -> Iterator[Owned]:
        """What is held for a step on its way."""
        if self._flight is not None and self._flight.held:
            yield Owned("a step on its way", self._flight.held)

    def _begin(self, running: Sequence[SequenceState]) -> _Rows | None:
        if not all(map(_is_plain, running)):
            return None
        num_pages = self._pool.layout.num_pages
        if not self._holdings.extend_running(running, [num_pages(len(sequence.tokens)) for sequence in running]):
            return None
        pieces = [Piece(s.tokens[-1:], s.num_computed, s.pages) for s in running]
        graphs = self._runner.in_one_launch(pieces)
        if graphs is None:
            return None
        ends = [self._ends.of(sequence) for sequence in running]
        return _Rows(
            list(running),
            ends,
            np.array([sequence.num_computed for sequence in running], np.int64),
            min(end.full - len(sequence.tokens) for end, sequence in zip(ends, running, strict=True)),
            Course(graphs, pieces, [sequence.params for sequence in running]),
        )

    def _launch(self, *, ahead: bool) -> _Flight | None:
        """The next step of the course; none where it must not be launched yet, or cannot be."""
        rows = self._rows
        if rows is None or (ahead and rows.course.num_launched >= rows.least_left):
            return None
        layout, past_N = self._pool.layout, rows.past_N + rows.course.num_launched
        size, groups = layout.page_tokens, layout.num_groups
        first = np.flatnonzero(past_N % size == 0).tolist()
        sequences = [rows.sequences[row] for row in first]
        places = (past_N // size * groups).tolist()
        if not self._holdings.extend_running(sequences, [places[row] + groups for row in first]):
            return None
        grown = [(row, s.pages[places[row] : places[row] + groups]) for row, s in zip(first, sequences, strict=True)]
        launched = rows.course.launch(grown)
        if launched is None:
            self._rows = None
            return None
        held: list[int] = []
        if ahead:
            # Who ends with the step before it gives his pages back while this one still writes to them.
            held = [page for s, at in zip(rows.sequences, places, strict=True) for page in s.pages[at : at + groups]]
            self._pool.retain(held, None)
        return _Flight(rows, launched, held)

    def _collect(self, flight: _Flight, running: Sequence[SequenceState], step: int) -> list[Event]:
        tokens, sound = flight.launched.wait()
        self._pool.free(flight.held)
        sequences = flight.rows.sequences
        here = None if sequences == running else set(running)
        alive = sequences if here is None else [s for s in sequences if s in here]
        for tenant, count in Counter([s.terms.tenant for s in alive]).items():
            self._service.charge(tenant, count, decode=True)
        size, trims = self._pool.layout.page_tokens, self._pool.layout.gives_back
        events: list[Event] = []
        for sequence, token, is_sound, end in zip(sequences, tokens, sound, flight.rows.ends, strict=True):
            if here is not None and sequence not in here:
                continue
            sequence.last_step = step
            if not is_sound:
                events += self._settle(Advanced(sequence, problem=UNSOUND))
                continue
            finish = accept(sequence, token, end)
            event = TokenEvent(sequence.request_id, token, finish, None, None, sequence.num_found, sequence.began_s)
            if finish is not None:
                events += self._settle(Advanced(sequence, [event]))
                continue
            sequence.num_computed += 1
            if sequence.num_computed % size == 0:
                self._holdings.remember(sequence, tail=False)
            if trims:
                self._holdings.trim(sequence)
            events.append(event)
        return events


def _is_plain(sequence: SequenceState) -> bool:
    """Whether logits and a random number are all that its next token, one of the answer after its first, depends on."""
    params, history = sequence.params, sequence.history
    return (
        len(sequence.tokens) - sequence.num_computed == 1
        and sequence.num_answered >= max(1, params.min_tokens)
        and params.logprobs is None
        and not params.logit_bias
        and (history is None or not history.steers)
        and sequence.terms.adapter == BASE
        and not sequence.prefill_only
    )
