"""How many workers of each role there should be: one pure decision for the whole application."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Those there should be by the last decision."""
    running: int
    """Of them, those that run."""
    least: int
    most: int

    @property
    def one_more(self) -> int:
        """One more than now; whoever is still starting is that one."""
        return self.current + (self.running >= self.current)


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
    if signals.decode_rate <= 0:
        # Nothing was heard from workers lately, or ever: what is there stays, and somebody must answer.
        return _within(prefill.current, prefill), _within(max(1, decode.current), decode)
    if prefill.least == 0 and prompts < _TOO_LITTLE:
        # A worker of its own would stand idle most of the time.
        answers, prompts = answers + prompts, 0.0
    held = decode.current * signals.kv_share
    wanted_prefill = _settled(prompts, prefill.current)
    wanted_decode = max(1, _settled(max(answers, held), decode.current))
    # What clients see goes before what the rates say: those may be wrong, or a burst is here.
    if signals.queue_age_s > objectives.first_token_s / 2 or signals.first_s > objectives.first_token_s:
        if prompts > 0:
            wanted_prefill = max(wanted_prefill, prefill.one_more)
        else:
            wanted_decode = max(wanted_decode, decode.one_more)
    if signals.token_s > objectives.token_s and answers > 0:
        wanted_decode = max(wanted_decode, decode.one_more)
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
