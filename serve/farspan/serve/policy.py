"""Where a request goes: a pure choice by what it will cost everybody.

Each worker can compute a prompt and decode. For every way (all on one, or the prompt on one and the rest on another)
the seconds that this request waits are predicted, and the seconds by which it holds up those that run already. The way
with the least of both wins; ways that are as good are decided by the session, so that it comes back to its pages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from farspan.serve.load import WorkerLoad

# Predictions are not better than that: closer ways are the same.
_SAME = 0.03
# Of those that compute prompts, and of those that decode, the best so many are paired.
_TRIED = 4


@dataclass(frozen=True, slots=True)
class Place:
    """A worker, and what had to be done there when it was chosen."""

    deployment: str
    worker: str
    kind: str = ""
    num_running: int = 0
    kv_tokens: int = 0
    queue_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """`split`: prefill on a prefill worker, then decode elsewhere; otherwise everything on the decode worker.

    Without places, whoever is free takes it.
    """

    split: bool
    reason: str
    prefill: Place | None = None
    decode: Place | None = None
    weights: str = ""
    """Fingerprint of the model it is answered with; empty: any."""
    first_s: float | None = None
    """Predicted until the first token."""
    token_s: float | None = None
    """Predicted between two tokens."""
    new_tokens: int = 0
    """Of the prompt, those that must be computed."""
    between_s: float = 0.0
    """Of `first_s`, what goes to sequences that decode on the way."""
    predicted: bool = False
    """Whether the times are of a model that has seen enough to refuse somebody for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is known of a request before it is answered."""

    prompt_tokens: int
    answer_tokens: int
    """Expected, not most."""
    found: Mapping[str, int] = field(default_factory=dict)
    """Tokens of its beginning that a worker has."""
    session: str = ""
    """Requests of one session are likely to begin alike."""
    seed: str = ""
    """Decides between ways that are as good, where there is no session."""


class Times(Protocol):
    """Predicted seconds, as `Predictor` tells them."""

    def prefill_s(self, kind: str, new_tokens: float, context_tokens: float) -> float: ...

    def decode_s(self, kind: str, running: float, kv_tokens: float) -> float: ...

    def transfer_s(self, num_bytes: float) -> float: ...

    def num_prefills(self, kind: str) -> int: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What a way must keep to."""

    colocate_below_tokens: int = 0
    always_split: bool = False
    """Whatever is predicted: prompts on prefill workers, answers on decode workers."""
    trusted_after: int = 20
    """Prompts that must have been seen before somebody is refused because of a prediction."""


@dataclass(frozen=True, slots=True)
class _Way:
    decode: WorkerLoad
    prefill: WorkerLoad | None
    new_tokens: int
    first_s: float
    between_s: float
    token_s: float
    cost_s: float

    @property
    def workers(self) -> str:
        return self.decode.worker if self.prefill is None else f"{self.prefill.worker} {self.decode.worker}"


def choose_route(asked: Asked, workers: Sequence[WorkerLoad], times: Times, rules: Rules) -> Route:
    """The way of a request over the workers that were heard of lately."""
    if not workers:
        split = rules.always_split and asked.prompt_tokens >= rules.colocate_below_tokens
        reason = "no worker was heard of lately"
        return Route(split, reason if split or not rules.always_split else f"{_too_short(asked, rules)}; {reason}")
    ways = _ways(asked, _with_room(asked, workers), times, rules)
    best = min(way.cost_s for way in ways)
    good = [way for way in ways if way.cost_s <= best * (1 + _SAME)]
    # Pages do not travel for nothing.
    way = _settle(asked, [way for way in good if way.prefill is None] or good)
    return _route(asked, way, ways, times, rules)


def _too_short(asked: Asked, rules: Rules) -> str:
    return f"{asked.prompt_tokens} prompt tokens, fewer than {rules.colocate_below_tokens}"


def _with_room(asked: Asked, workers: Sequence[WorkerLoad]) -> Sequence[WorkerLoad]:
    """The load gate: those that can begin it at once, if there are any, however much the others have of it already."""
    wanted = asked.prompt_tokens + asked.answer_tokens
    begun = [w for w in workers if w.num_running + w.num_waiting < w.max_sequences and w.free_tokens >= wanted]
    return begun or workers


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What computing the prompt on one worker comes to."""

    worker: WorkerLoad
    new_tokens: int
    first_s: float
    between_s: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class _Answer:
    """What decoding on one worker comes to."""

    worker: WorkerLoad
    token_s: float
    cost_s: float


def _ways(asked: Asked, workers: Sequence[WorkerLoad], times: Times, rules: Rules) -> list[_Way]:
    prompting = decoding = workers
    if rules.always_split:
        # Without one of its role, any worker does.
        prompting = [w for w in workers if w.deployment == "prefill"] or workers
        decoding = [w for w in workers if w.deployment == "decode"] or workers
    prompts = {w.worker: _prompt(asked, w, times) for w in (*prompting, *decoding)}
    answers = [_answer(asked, w, times) for w in decoding]
    alone = [_alone(prompts[answer.worker.worker], answer) for answer in answers]
    if asked.prompt_tokens < rules.colocate_below_tokens:
        return alone
    # The cost of a pair is a sum: those of few good ones on either side are the best.
    first = _best(asked, [prompts[w.worker] for w in prompting])
    then = _best(asked, answers)
    pairs = [_pair(asked, prompt, answer, times) for prompt in first for answer in then if _may(prompt, answer)]
    return pairs if rules.always_split and pairs else alone + pairs


Part = TypeVar("Part", _Prompt, _Answer)


def _best(asked: Asked, parts: Sequence[Part]) -> Sequence[Part]:
    return sorted(parts, key=lambda part: (part.cost_s, -_draw(asked, part.worker.worker)))[:_TRIED]


def _may(prompt: _Prompt, answer: _Answer) -> bool:
    """Whether pages may travel from one to the other."""
    source, target = prompt.worker, answer.worker
    return source.worker != target.worker and source.layout == target.layout and source.travels


def _alone(prompt: _Prompt, answer: _Answer) -> _Way:
    cost_s = prompt.cost_s + answer.cost_s
    return _Way(answer.worker, None, prompt.new_tokens, prompt.first_s, prompt.between_s, answer.token_s, cost_s)


def _pair(asked: Asked, prompt: _Prompt, answer: _Answer, times: Times) -> _Way:
    # The first token is there before its pages travel; the second waits for them.
    moved_s = times.transfer_s(asked.prompt_tokens * prompt.worker.token_bytes)
    cost_s = prompt.cost_s + moved_s + answer.cost_s
    return _Way(
        answer.worker, prompt.worker, prompt.new_tokens, prompt.first_s, prompt.between_s, answer.token_s, cost_s
    )


def _prompt(asked: Asked, worker: WorkerLoad, times: Times) -> _Prompt:
    new = max(1, asked.prompt_tokens - asked.found.get(worker.worker, 0))
    context = asked.prompt_tokens - new / 2
    alone_s, between_s = times.prefill_s(worker.kind, worker.queue_tokens + new, context), 0.0
    if worker.num_running:
        # Every iteration on the way also computes a token of whoever decodes there.
        share = min(worker.prefill_tokens or worker.max_batch_tokens, worker.max_batch_tokens)
        iterations = math.ceil((worker.queue_tokens + new) / max(1, share))
        between_s = iterations * times.decode_s(worker.kind, worker.num_running, worker.kv_tokens)
    # And whoever decodes there waits while the prompt is computed.
    held_up_s = times.prefill_s(worker.kind, new, context) * worker.num_running
    return _Prompt(worker, new, alone_s + between_s, between_s, alone_s + between_s + held_up_s)


def _answer(asked: Asked, worker: WorkerLoad, times: Times) -> _Answer:
    held = asked.prompt_tokens + asked.answer_tokens / 2
    # Whoever waits now will decode beside it.
    rows = worker.num_running + worker.num_waiting
    # Where not all may decode in an iteration, they take turns.
    most = worker.decode_tokens or worker.max_sequences
    with_it_s = times.decode_s(worker.kind, rows + 1, worker.kv_tokens + held) * max(1.0, (rows + 1) / most)
    before_s = times.decode_s(worker.kind, rows, worker.kv_tokens) * max(1.0, rows / most)
    # All others together wait longer for each of their tokens.
    return _Answer(worker, with_it_s, asked.answer_tokens * (with_it_s + rows * (with_it_s - before_s)))


def _settle(asked: Asked, ways: Sequence[_Way]) -> _Way:
    """One of the ways that are as good: the same for all requests of a session, as long as its workers are there."""
    return max(ways, key=lambda way: _draw(asked, way.workers))


def _draw(asked: Asked, name: str) -> int:
    """A number that only the session, or else the request, and the name decide."""
    text = f"{asked.session or asked.seed} {name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _route(asked: Asked, way: _Way, ways: Sequence[_Way], times: Times, rules: Rules) -> Route:
    first = way.prefill or way.decode
    return Route(
        way.prefill is not None,
        _reason(asked, way, ways, rules),
        None if way.prefill is None else _place(way.prefill),
        _place(way.decode),
        way.decode.weights,
        way.first_s,
        way.token_s,
        way.new_tokens,
        way.between_s,
        times.num_prefills(first.kind) >= rules.trusted_after,
    )


def _reason(asked: Asked, way: _Way, ways: Sequence[_Way], rules: Rules) -> str:
    said = f"{way.first_s:.3g} s to the first token and {way.token_s:.3g} s a token predicted"
    found = asked.prompt_tokens - way.new_tokens
    if found > 0:
        said += f", {found} prompt tokens found"
    if asked.prompt_tokens < rules.colocate_below_tokens:
        return f"{_too_short(asked, rules)}; {said}"
    others = [other for other in ways if (other.prefill is None) != (way.prefill is None)]
    if others:
        least = min(other.cost_s for other in others)
        name = "on one worker" if way.prefill is not None else "on two workers"
        said += f"; costs everybody {way.cost_s:.3g} s, {name} {least:.3g} s"
    return said


def _place(load: WorkerLoad) -> Place:
    return Place(load.deployment, load.worker, load.kind, load.num_running, load.kv_tokens, load.queue_tokens)
