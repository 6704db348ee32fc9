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
from typing import Protocol

from farspan.serve.load import WorkerLoad

# Predictions are not better than that: closer ways are the same.
_SAME = 0.03


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
    way = _settle(asked, [way for way in ways if way.cost_s <= best * (1 + _SAME)])
    return _route(asked, way, ways, times, rules)


def _too_short(asked: Asked, rules: Rules) -> str:
    return f"{asked.prompt_tokens} prompt tokens, fewer than {rules.colocate_below_tokens}"


def _with_room(asked: Asked, workers: Sequence[WorkerLoad]) -> Sequence[WorkerLoad]:
    """The load gate: those that can begin it at once, if there are any, however much the others have of it already."""
    wanted = asked.prompt_tokens + asked.answer_tokens
    begun = [w for w in workers if w.num_running + w.num_waiting < w.max_sequences and w.free_tokens >= wanted]
    return begun or workers


def _ways(asked: Asked, workers: Sequence[WorkerLoad], times: Times, rules: Rules) -> list[_Way]:
    prompting = decoding = workers
    if rules.always_split:
        # Without one of its role, any worker does.
        prompting = [w for w in workers if w.deployment == "prefill"] or workers
        decoding = [w for w in workers if w.deployment == "decode"] or workers
    alone = [_alone(asked, w, times) for w in decoding]
    if asked.prompt_tokens < rules.colocate_below_tokens:
        return alone
    pairs = [
        _pair(asked, p, d, times)
        for p in prompting
        for d in decoding
        if p.worker != d.worker and p.layout == d.layout and p.travels
    ]
    return pairs if rules.always_split and pairs else alone + pairs


def _alone(asked: Asked, worker: WorkerLoad, times: Times) -> _Way:
    new, compute_s, waits_s, between_s = _prefill(asked, worker, times)
    token_s, slower_s = _decode(asked, worker, times)
    # Whoever decodes here waits while the prompt is computed.
    held_up_s = compute_s * worker.num_running
    cost_s = waits_s + asked.answer_tokens * (token_s + slower_s) + held_up_s
    return _Way(worker, None, new, waits_s, between_s, token_s, cost_s)


def _pair(asked: Asked, prefill: WorkerLoad, decode: WorkerLoad, times: Times) -> _Way:
    new, compute_s, waits_s, between_s = _prefill(asked, prefill, times)
    token_s, slower_s = _decode(asked, decode, times)
    # The first token is there before its pages travel; the second waits for them.
    moved_s = times.transfer_s(asked.prompt_tokens * prefill.token_bytes)
    held_up_s = compute_s * prefill.num_running
    cost_s = waits_s + moved_s + asked.answer_tokens * (token_s + slower_s) + held_up_s
    return _Way(decode, prefill, new, waits_s, between_s, token_s, cost_s)


def _prefill(asked: Asked, worker: WorkerLoad, times: Times) -> tuple[int, float, float, float]:
    """(tokens to compute, seconds that takes, seconds until the first token, of them for those that decode here)."""
    new = max(1, asked.prompt_tokens - asked.found.get(worker.worker, 0))
    context = asked.prompt_tokens - new / 2
    compute_s = times.prefill_s(worker.kind, new, context)
    alone_s, between_s = times.prefill_s(worker.kind, worker.queue_tokens + new, context), 0.0
    if worker.num_running:
        # Every iteration on the way also computes a token of whoever decodes there.
        share = min(worker.prefill_tokens or worker.max_batch_tokens, worker.max_batch_tokens)
        iterations = math.ceil((worker.queue_tokens + new) / max(1, share))
        between_s = iterations * times.decode_s(worker.kind, worker.num_running, worker.kv_tokens)
    return new, compute_s, alone_s + between_s, between_s


def _decode(asked: Asked, worker: WorkerLoad, times: Times) -> tuple[float, float]:
    """(seconds for a token here, seconds by which all others together wait longer for theirs)."""
    held = asked.prompt_tokens + asked.answer_tokens / 2
    # Whoever waits now will decode beside it.
    rows = worker.num_running + worker.num_waiting
    most = worker.decode_tokens or worker.max_sequences
    # Where not all may decode in an iteration, they take turns.
    with_it_s = times.decode_s(worker.kind, rows + 1, worker.kv_tokens + held) * max(1.0, (rows + 1) / most)
    before_s = times.decode_s(worker.kind, rows, worker.kv_tokens) * max(1.0, rows / most)
    return with_it_s, rows * (with_it_s - before_s)


def _settle(asked: Asked, ways: Sequence[_Way]) -> _Way:
    """One of the ways that are as good: the same for all requests of a session, as long as its workers are there."""
    by = asked.session or asked.seed
    return max(ways, key=lambda way: hashlib.blake2b(f"{by} {way.workers}".encode(), digest_size=8).digest())


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
