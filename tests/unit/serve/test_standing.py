"""A worker keeps its role as far as what it was sent allows."""

from __future__ import annotations

import pytest
from tests.unit.engine.tiny import engine_config, tiny_model

from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.serve.quotas import Quota
from farspan.serve.standing import Role

STREAMS, PROMPT = 7, 300


def iterations(quota: Quota) -> tuple[int, list[int]]:
    """Of a prompt beside seven streams: (how many it took, tokens that each stream got meanwhile)."""
    engine = Engine(tiny_model(), engine_config(max_batch_tokens=256))
    role = Role(engine)
    for n in range(STREAMS):
        engine.add(f"stream{n}", [5, 6, 7 + n], SamplingParams(max_tokens=400, ignore_eos=True))
    engine.step()
    role.take(quota)
    prompt = [3 * n % 90 for n in range(PROMPT)]
    engine.add("prompt", prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    given = dict.fromkeys((f"stream{n}" for n in range(STREAMS)), 0)
    for count in range(1, PROMPT):
        role.keep()
        names = [event.request_id for event in engine.step()]
        if "prompt" in names:
            return count, list(given.values())
        for name in names:
            given[name] += 1
    raise AssertionError("the prompt was never computed")


def test_on_a_worker_for_answers_a_prompt_comes_in_pieces_and_every_stream_gets_a_token_with_each() -> None:
    whole, _ = iterations(Quota(None, None))
    count, given = iterations(Quota(16, None))
    # One of eight requests: an eighth of the 256 tokens of an iteration.
    assert whole < count == -(-PROMPT // 32)
    assert given == [count - 1] * STREAMS


@pytest.mark.parametrize("quota", [Quota(None, 1), Quota(None, None)])
def test_on_a_worker_for_prompts_a_prompt_is_computed_at_once(quota: Quota) -> None:
    assert iterations(quota)[0] == 2
