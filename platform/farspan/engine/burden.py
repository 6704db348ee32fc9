"""What an engine has before it, in numbers that decide where the next request goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from farspan.engine.request import SequenceState


@dataclass(frozen=True, slots=True)
class Burden:
    """Of all requests of one engine."""

    prompting: tuple[str, ...] = ()
    """Those with more than one token to compute before their next one: prompts, and what was preempted."""
    queue_tokens: int = 0
    """Tokens that they have to compute."""
    num_decoding: int = 0
    kv_tokens: int = 0
    """Tokens that those that decode look at."""


def burden_of(sequences: Iterable[SequenceState]) -> Burden:
    prompting: list[str] = []
    queue_tokens = num_decoding = kv_tokens = 0
    for sequence in sequences:
        pending = len(sequence.tokens) - sequence.num_computed
        if pending > 1:
            prompting.append(sequence.request_id)
            queue_tokens += pending
        else:
            num_decoding += 1
            kv_tokens += len(sequence.tokens)
    return Burden(tuple(prompting), queue_tokens, num_decoding, kv_tokens)
