"""Whatever happens in whatever order: no page is lost or doubly owned, everybody is answered once and right."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from tests.unit.engine.ledger import Clock, answer, ledger_engine
from tests.unit.engine.tiny import VOCAB

from farspan.engine.request import FailedEvent, SamplingParams
from farspan.engine.terms import Terms
from farspan.kv.ownership import Owned
from farspan.kv.prefix import PrefixScope


@dataclass
class Wish:
    prompt: list[int]
    num_tokens: int
    terms: Terms
    tokens: list[int] = field(default_factory=list)


class World:
    """Random things that happen to one engine, and what must be true after each."""

    def __init__(self, seed: int, num_pages: int = 40, **settings: object) -> None:
        self.chance, self.clock = random.Random(seed), Clock()
        self.engine, self.ledger = ledger_engine(
            num_pages, self.clock, max_batch_tokens=24, max_sequences=5, **settings
        )
        self.open: dict[str, Wish] = {}
        self.outside: list[list[int]] = []
        self.counts = dict.fromkeys(("finished", "cancelled", "late", "preempted", "offloaded", "found", "denied"), 0)
        self.closed: set[str] = set()
        self.preambles = [[self.chance.randrange(VOCAB) for _ in range(length)] for length in (5, 16, 30)]
        preempt = self.engine._preempt

        def count(sequence, *, offload):
            preempt(sequence, offload=offload)
            self.counts["preempted"] += 1
            self.counts["offloaded"] += sequence.kept is not None

        self.engine._preempt = count  # type: ignore[method-assign]

    def happen(self, number: int) -> None:
        self.clock.now_s += 0.01
        action = self.chance.random()
        if action < 0.14 and len(self.open) < 60:
            self._arrive(f"r{number}")
        elif action < 0.17 and self.open:
            name = self.chance.choice(sorted(self.open))
            assert self.engine.cancel(name)
            self._close(name, "cancelled")
        elif action < 0.19:
            self._hold_outside()
        elif action < 0.20:
            self.engine.set_quotas(self.chance.choice([None, 3, 9]), self.chance.choice([None, 1, 2]))
        else:
            self.step()
        self.engine.check_integrity(Owned("outside", pages) for pages in self.outside)

    def step(self) -> None:
        for event in self.engine.step():
            wish = self.open[event.request_id]
            if isinstance(event, FailedEvent):
                assert wish.terms.deadline_s is not None
                assert wish.terms.deadline_s <= self.clock.now_s
                assert "deadline passed" in str(event.error)
                self._close(event.request_id, "late")
                continue
            wish.tokens.append(event.token)
            if event.finish:
                assert wish.tokens == answer(wish.prompt, wish.num_tokens)
                self._close(event.request_id, "finished")

    def finish(self) -> None:
        for pages in self.outside:
            self.engine.pool.free(pages)
        self.engine.set_quotas(None, None)
        for _ in range(5000):
            if not self.open:
                break
            self.clock.now_s += 0.01
            self.step()
        assert not self.open
        assert not self.engine.has_work
        self.engine.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_pages

    def _arrive(self, name: str) -> None:
        start = self.chance.choice([[], *self.preambles])
        prompt = start + [self.chance.randrange(VOCAB) for _ in range(self.chance.randint(1, 25))]
        terms = Terms(
            tenant=self.chance.choice("abc"),
            priority=self.chance.choice([0, 0, 0, 1]),
            deadline_s=self.clock.now_s + self.chance.uniform(0.2, 10) if self.chance.random() < 0.3 else None,
            scope=PrefixScope(salt=self.chance.choice(["", "", "own"])),
        )
        wish = Wish(prompt, self.chance.randint(1, 40), terms)
        self.engine.add(name, prompt, SamplingParams(max_tokens=wish.num_tokens), terms=terms)
        self.open[name] = wish

    def _hold_outside(self) -> None:
        """Pages come and go that the engine does not see: leases, pulls."""
        if self.outside:
            self.engine.pool.free(self.outside.pop())
        elif (pages := self.engine.pool.alloc(self.chance.randint(1, 12))) is None:
            self.counts["denied"] += 1
        else:
            self.outside.append(pages)

    def _close(self, name: str, how: str) -> None:
        assert name not in self.closed, "answered twice"
        self.closed.add(name)
        del self.open[name]
        self.counts[how] += 1


@pytest.mark.parametrize(
    "settings",
    [
        {"offload_bytes": 64 * 4096},
        {"offload_bytes": 0},
        {"prefix_cache": False},
        {"window": 9, "num_pages": 62, "offload_bytes": 64 * 4096},
        {"window": 9, "num_pages": 62, "draft_tokens": 3},
        {"offload_bytes": 64 * 4096, "steps": "in one launch", "num_pages": 60},
        {"offload_bytes": 64 * 4096, "steps": "ahead", "num_pages": 60},
    ],
    ids=["offload", "recompute", "no cache", "windows, offload", "windows, guesses", "in one launch", "ahead"],
)
@pytest.mark.parametrize("num_events", [10_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_random_events_leave_no_page_lost_and_answer_everyone_once(num_events, settings):
    # Three layers hold what one does otherwise.
    num_events //= 3 if "window" in settings else 1
    world = World(7, **settings)
    for number in range(num_events):
        world.happen(number)
    world.finish()
    for what in ("finished", "cancelled", "late", "preempted"):
        assert world.counts[what] > num_events / 500, f"too few {what} to prove anything: {world.counts}"
    if settings.get("steps"):
        assert world.ledger.steps.num_launched > num_events / 20, "too few to prove anything"
    if settings.get("offload_bytes"):
        assert world.counts["offloaded"] > num_events / 500, world.counts
    assert world.counts["finished"] + world.counts["cancelled"] + world.counts["late"] == len(world.closed)


@pytest.mark.parametrize("steps", ["", "in one launch", "ahead"])
def test_long_answers_of_one_tenant_do_not_keep_another_waiting_and_are_all_right(steps):
    engine, _ = ledger_engine(80, max_sequences=2, steps=steps)
    prompts = {name: [place, 1, 2] for place, name in enumerate(("b0", "b1", "b2", "a0"))}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    finished: list[str] = []

    def step() -> None:
        for event in engine.step():
            tokens[event.request_id].append(event.token)
            finished.extend([event.request_id] if event.finish else [])

    for name in ("b0", "b1", "b2"):
        engine.add(name, prompts[name], SamplingParams(max_tokens=60), terms=Terms(tenant="b"))
    for _ in range(10):
        step()
    engine.add("a0", prompts["a0"], SamplingParams(max_tokens=5), terms=Terms(tenant="a"))
    while engine.has_work:
        step()
        engine.check_integrity()
    assert finished[0] == "a0"
    assert sorted(finished) == sorted(prompts)
    for name, prompt in prompts.items():
        assert tokens[name] == answer(prompt, 5 if name == "a0" else 60)
