"""A load that turns round, what became of each of its requests, and the roles meanwhile. No Ray."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from farspan.errors import ClusterError
from farspan.serve.bench_client import BenchClient, Streamed
from farspan.serve.load import WorkerLoad

# As often as the ingress asks the workers itself.
_LOOK_S = 0.5
# Around a change of roles, where nobody may stand still.
_CHANGE_S = 2.0
_FEWEST_TOKENS = 6
FIXED, FOLLOWING = "fixed", "following the load"
Standing = Callable[[], Awaitable[list[WorkerLoad]]]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """The load. Ranges are drawn from, both ends included."""

    half_s: float = 40.0
    many: float = 0.9
    """Of the requests of the first half, those with a long prompt; of the second half, those with a long answer."""
    load: float = 0.7
    """Part of the time of two workers that the requests of a half need: fixed roles have one worker for most of it."""
    long_prompt: tuple[int, int] = (512, 1024)
    short_answer: tuple[int, int] = (4, 12)
    short_prompt: int = 32
    long_answer: tuple[int, int] = (64, 192)
    burst: int = 12
    """Requests at once, by which it is measured what one of a kind takes."""
    patience: float = 8.0
    """Objectives: so many times what a prompt, and a token of a burst, takes."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the load."""

    at_s: float
    """After the first."""
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Pace:
    """What a request takes of one worker, and what counts as in time."""

    prompt_s: float
    answer_s: float
    first_s: float
    """Objective: until the first token."""
    token_s: float
    """Objective: between two tokens, on average."""


@dataclass(slots=True)
class Driven:
    """What became of a load: an answer for each request, none where it was lost."""

    asked: list[Asked]
    began_s: float
    answers: list[Streamed | None] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    """When a worker had another role than before."""

    @property
    def took_s(self) -> float:
        """From the first request to the last token."""
        return max((found.at_s[-1] for found in self.answers if found is not None), default=self.began_s) - self.began_s


async def measure(flip: Flip, client: BenchClient, vocab_size: int) -> Pace:
    """Bursts of one kind each. The first of a kind compiles, and does not count. Raises as `BenchClient.stream`."""
    chance = random.Random(-1 - flip.seed)
    took: dict[bool, float] = {}
    token_s: dict[bool, float] = {}
    for long_prompt in (True, True, False, False):
        burst = [_drawn(flip, chance, 0.0, vocab_size, long_prompt=long_prompt) for _ in range(flip.burst)]
        began_s = time.perf_counter()
        found = await asyncio.gather(*(client.stream(one.prompt, one.new_tokens) for one in burst))
        took[long_prompt] = (time.perf_counter() - began_s) / flip.burst
        token_s[long_prompt] = sum(map(_token_s, found)) / flip.burst
    return Pace(took[True], took[False], flip.patience * took[True], flip.patience * token_s[False])


def flipping(flip: Flip, pace: Pace, vocab_size: int) -> list[Asked]:
    """The requests of both halves, in the order of their times."""
    chance, asked = random.Random(flip.seed), list[Asked]()
    for half, many in enumerate((flip.many, 1 - flip.many)):
        each_s = many * pace.prompt_s + (1 - many) * pace.answer_s
        at_s = half * flip.half_s
        while (at_s := at_s + chance.expovariate(2 * flip.load / each_s)) < (half + 1) * flip.half_s:
            asked.append(_drawn(flip, chance, at_s, vocab_size, long_prompt=chance.random() < many))
    return asked


def _drawn(flip: Flip, chance: random.Random, at_s: float, vocab_size: int, *, long_prompt: bool) -> Asked:
    length = chance.randint(*flip.long_prompt) if long_prompt else flip.short_prompt
    new_tokens = chance.randint(*(flip.short_answer if long_prompt else flip.long_answer))
    return Asked(at_s, tuple(chance.randrange(vocab_size) for _ in range(length)), new_tokens)


class Watched:
    """The roles of workers over time."""

    def __init__(self) -> None:
        self.changes: list[float] = []
        self._roles: dict[str, tuple[int | None, int | None]] = {}

    @classmethod
    @asynccontextmanager
    async def over(cls, standing: Standing) -> AsyncIterator[Watched]:
        """Look at the workers, again and again, for the time of the block."""
        watched = cls()
        watched.see(await standing(), time.perf_counter())
        looking = asyncio.ensure_future(watched._look(standing))
        try:
            yield watched
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    def see(self, workers: Sequence[WorkerLoad], at_s: float) -> None:
        """How workers stand at a time of `time.perf_counter`."""
        for load in workers:
            role = load.prefill_tokens, load.decode_tokens
            if self._roles.setdefault(load.worker, role) != role:
                self._roles[load.worker] = role
                self.changes.append(at_s)

    async def _look(self, standing: Standing) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self.see(await standing(), time.perf_counter())


async def drive(client: BenchClient, asked: list[Asked], watched: Watched) -> Driven:
    """Ask everything at its time, and wait for all answers."""
    driven = Driven(asked, time.perf_counter())

    async def one(wanted: Asked) -> Streamed | None:
        await asyncio.sleep(max(0.0, driven.began_s + wanted.at_s - time.perf_counter()))
        try:
            return await client.stream(wanted.prompt, wanted.new_tokens)
        except ClusterError:
            return None

    driven.answers = list(await asyncio.gather(*map(one, asked)))
    driven.changes = [at_s for at_s in watched.changes if at_s >= driven.began_s]
    return driven


def role_rows(flip: Flip, pace: Pace, fixed: Driven, following: Driven) -> list[dict[str, Any]]:
    """One row for each way; what was wrong with the second is in its row."""
    rows = [_row(flip, pace, name, driven) for name, driven in ((FIXED, fixed), (FOLLOWING, following))]
    rows[1]["goodput of following / fixed"] = rows[1]["goodput_per_s"] / max(rows[0]["goodput_per_s"], 1e-9)
    if problem := _wrong(fixed, following):
        rows[1]["wrong"] = problem
    return rows


def _row(flip: Flip, pace: Pace, name: str, driven: Driven) -> dict[str, Any]:
    told = list(zip(driven.asked, driven.answers, strict=True))
    good = [wanted for wanted, found in told if found is not None and _is_in_time(pace, found)]
    tokens = sum(len(wanted.prompt) + wanted.new_tokens for wanted, found in told if found is not None)
    first_half = sum(wanted.at_s < flip.half_s for wanted in good)
    return {
        "work": f"{flip.many:.0%} long prompts, after {flip.half_s:g} s {flip.many:.0%} long answers",
        "roles": name,
        "requests": len(told),
        "lost": sum(found is None for _, found in told),
        "first_token_s <=": pace.first_s,
        "token_s <=": pace.token_s,
        "goodput_per_s": len(good) / (2 * flip.half_s),
        "in time, first half": first_half,
        "in time, second half": len(good) - first_half,
        "tokens_per_s": tokens / driven.took_s if driven.took_s else 0.0,
        "role changes": len(driven.changes),
        "longest_pause_s": longest_pause_s(driven, [(driven.began_s, driven.began_s + driven.took_s)]),
        "longest_pause_at_a_change_s": longest_pause_s(
            driven, [(at_s - _CHANGE_S, at_s + _CHANGE_S) for at_s in driven.changes]
        ),
    }


def longest_pause_s(driven: Driven, windows: Sequence[tuple[float, float]]) -> float:
    """The longest time in any window without a word of any answer although somebody waited for one."""
    open_s = [
        (driven.began_s + wanted.at_s, found.at_s)
        for wanted, found in zip(driven.asked, driven.answers, strict=True)
        if found is not None
    ]
    said = sorted(itertools.chain.from_iterable((asked_s, *at_s) for asked_s, at_s in open_s))
    longest = 0.0
    for earlier, later in itertools.pairwise(said):
        # Between two events nobody comes or goes: whoever waits at the beginning waits all the time.
        if any(asked_s <= earlier and at_s[-1] >= later for asked_s, at_s in open_s):
            inside = (min(later, end) - max(earlier, begin) for begin, end in windows)
            longest = max(longest, *inside, 0.0)
    return longest


def _wrong(fixed: Driven, following: Driven) -> str:
    lost = sum(found is None for found in following.answers)
    if lost:
        return f"{lost} of {len(following.answers)} requests were lost where roles follow the load"
    pairs = [(a, b) for a, b in zip(fixed.answers, following.answers, strict=True) if a is not None and b is not None]
    if different := sum(a.tokens != b.tokens for a, b in pairs):
        return f"{different} answers are not those that fixed roles gave"
    if len({token for _, found in pairs for token in found.tokens}) < _FEWEST_TOKENS:
        return f"all answers together have fewer than {_FEWEST_TOKENS} different tokens: that proves nothing"
    return "" if following.changes else "no role ever changed"


def _is_in_time(pace: Pace, found: Streamed) -> bool:
    return found.first_s <= pace.first_s and _token_s(found) <= pace.token_s


def _token_s(found: Streamed) -> float:
    """On average between two tokens."""
    return (found.at_s[-1] - found.at_s[0]) / max(1, found.completion_tokens - 1)
