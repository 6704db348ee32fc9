"""How many workers of each role there should be: one pure decision for the application, and its form for Ray Serve.

Ray Serve asks `Sizing` for the replicas of all deployments at once, holds a decision back until it has been the same
for a while (up_s, down_s, to_zero_s), and starts or drains replicas. This module is sent to Serve's controller by
value, so it imports nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

# A role grows when its workers would be busier than this, and shrinks when one fewer would still be below that.
_BUSY, _CALM = 0.8, 0.6
# Prompts that keep less than this of a worker busy are computed where they are decoded, if a role may be empty.
_TOO_LITTLE = 0.3


@dataclass(frozen=True, slots=True)
class Signals:
    """What the ingress measures, lately."""

    prompt_tokens_s: float = 0.0
    """Of prompts that arrive, in a second."""
    hit_rate: float = 0.0
    """Share of them found in a cache."""
    answer_tokens_s: float = 0.0
    prefill_rate: float = 0.0
    """Prompt tokens that one worker computes in a second; 0: not known."""
    decode_rate: float = 0.0
    """Tokens that one worker gives in a second while it keeps to the objective; 0: not known."""
    queue_age_s: float = 0.0
    """How long the first prompt in a queue has waited."""
    kv_share: float = 0.0
    """Of the KV of all decode workers, what is held or will be by those that run."""
    token_s: float = 0.0
    """Between two tokens: 95 of 100 are shorter."""
    first_s: float = 0.0
    """Until a first token: 95 of 100 are shorter."""
    num_open: float = 0.0
    """Requests being answered, or waiting."""


@dataclass(frozen=True, slots=True)
class Role:
    """Where the number of workers of one role may lie."""

    current: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Objectives:
    """What clients should see."""

    first_token_s: float
    token_s: float


def sizes(signals: Signals, prefill: Role, decode: Role, objectives: Objectives) -> tuple[int, int]:
    """(prefill workers, decode workers) that there should be now."""
    prompts = _busy(signals.prompt_tokens_s * (1 - signals.hit_rate), signals.prefill_rate)
    answers = _busy(signals.answer_tokens_s, signals.decode_rate)
    if signals.num_open == 0 and prompts + answers < _TOO_LITTLE:
        return _within(0, prefill), _within(0, decode)
    if prefill.least == 0 and prompts < _TOO_LITTLE:
        # A worker of its own would stand idle most of the time.
        answers, prompts = answers + prompts, 0.0
    held = decode.current * signals.kv_share
    wanted_prefill = _settled(prompts, prefill.current)
    wanted_decode = max(1, _settled(max(answers, held), decode.current))
    if signals.queue_age_s > objectives.first_token_s / 2 or signals.first_s > objectives.first_token_s:
        # Prompts wait although the rates say they need not: the rates are wrong, or a burst is here.
        late = prefill if prompts > 0 else decode
        if late is prefill:
            wanted_prefill = max(wanted_prefill, prefill.current + 1)
        elif signals.queue_age_s > objectives.first_token_s / 2:
            wanted_decode = max(wanted_decode, decode.current + 1)
    if signals.token_s > objectives.token_s and answers > 0:
        wanted_decode = max(wanted_decode, decode.current + 1)
    return _within(wanted_prefill, prefill), _within(wanted_decode, decode)


def _busy(per_s: float, rate: float) -> float:
    """Workers that are kept busy all the time."""
    return per_s / rate if rate > 0 else 0.0


def _settled(busy: float, current: int) -> int:
    """As few as are not too busy, but not fewer than now until that leaves them calm."""
    grown, shrunk = math.ceil(busy / _BUSY), math.ceil(busy / _CALM)
    return grown if current < grown else min(current, shrunk)


def _within(wanted: int, role: Role) -> int:
    return min(role.most, max(role.least, wanted))


class Context(Protocol):
    """What is read of Ray Serve's AutoscalingContext."""

    deployment_name: str
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Any]] | None
    total_num_requests: float


class Sizing:
    """An application-level autoscaling policy of Ray Serve. The deployment `api` tells what it measures."""

    def __init__(self, first_token_s: float, token_s: float) -> None:
        self._objectives = Objectives(first_token_s, token_s)

    def __call__(self, contexts: Mapping[Any, Context]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        named = {context.deployment_name: context for context in contexts.values()}
        # While Serve starts or deletes an application, not all of it is there.
        if not {"api", "prefill", "decode"} <= set(named):
            return {key: context.target_num_replicas for key, context in contexts.items()}, {}
        signals = told(named["api"])
        prefill, decode = sizes(signals, _role(named["prefill"]), _role(named["decode"]), self._objectives)
        wanted = {"prefill": prefill, "decode": decode, "api": named["api"].target_num_replicas}
        return {key: wanted[context.deployment_name] for key, context in contexts.items()}, {}


def told(api: Context) -> Signals:
    """The newest signals of the ingress; with several of them, what each sees is added up, or the worst of it."""
    found: dict[str, float] = {}
    for name in (field.name for field in fields(Signals)):
        values = [series[-1].value for series in (api.raw_metrics or {}).get(name, {}).values() if series]
        if values:
            added = name in ("prompt_tokens_s", "answer_tokens_s", "num_open")
            found[name] = sum(values) if added else max(values)
    return Signals(**found)


def as_metrics(signals: Signals) -> dict[str, float]:
    """The signals as Ray Serve takes them from a replica."""
    return {name: float(value) for name, value in asdict(signals).items()}


def _role(context: Context) -> Role:
    return Role(
        context.target_num_replicas, context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    )
