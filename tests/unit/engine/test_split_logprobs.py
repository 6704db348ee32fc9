"""Prefill in one engine and decode in another gives the tokens and the log-probabilities of one engine doing both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.double import DoublePrecision
from tests.support.zoo import zoo_model
from tests.unit.engine.first_class import kinds
from tests.unit.engine.split import Split
from tests.unit.engine.tiny import engine_config
from tests.unit.engine.worded import worded_model
from transformers import PreTrainedModel

from farspan.engine.engine import Engine
from farspan.engine.request import Completion, Grammar, SamplingParams, TokenEvent, TokenLogprobs, choices, whole_answer

# Everything kept; windows; windows beside full attention; the same with sinks; latent attention; states beside pages.
KINDS = kinds(
    ("llama", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "bamba", "lfm2"),
    core=("llama", "gpt_oss", "deepseek_v3", "qwen3_next"),
)
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "presence_penalty": 0.3}
NUM_TOKENS = 20
# Sums of other lengths of rows are rounded elsewhere, in float64.
ROUNDING = 1e-8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return worded_model(tmp_path_factory.mktemp("worded"))[1]


@pytest.fixture(autouse=True)
def double_precision():
    with DoublePrecision():
        yield


class Sides:
    """A model whose prompts are computed here and answered there, and the same in one place."""

    def __init__(self, architecture: str, tokenizer: Any) -> None:
        def make(kind: str) -> PreTrainedModel:
            return zoo_model(kind, vocab_size=len(tokenizer))

        self.split = Split(architecture, "memory", make, tokenizer=tokenizer)
        self.one_place = Engine(make(architecture), engine_config(max_batch_tokens=16), tokenizer=tokenizer)

    def apart(self, prompt: list[int], params: SamplingParams) -> list[Completion]:
        """All answers to one prompt: each has a ticket of its own, and they go on side by side."""
        split, given = self.split, dict[str, list[TokenEvent]]()
        for name, one in choices("r", params):
            first, ticket = split.offer_as(name, prompt, one)
            assert first.finish is None
            arrival = split.pull(ticket)
            assert arrival.pages is not None
            assert split.leases.release(ticket.ticket_id)
            split.decode.adopt(name, prompt, one, [first.token], arrival.pages)
            given[name] = [first]
        while split.decode.has_work:
            for event in split.decode.step():
                assert isinstance(event, TokenEvent), event
                given[event.request_id].append(event)
        return [whole_answer(events) for events in given.values()]

    def close(self) -> None:
        for engine in (self.split.prefill, self.split.decode, self.one_place):
            engine.check_integrity()
            assert engine.pool.num_free == engine.pool.num_pages
            assert engine.states is None or engine.states.num_free == engine.states.num_slots
        self.split.close()


@pytest.fixture(scope="module")
def sides(request, tokenizer):
    with DoublePrecision():
        made = Sides(request.param, tokenizer)
    yield made
    made.close()


def row(length: int) -> list[int]:
    return torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [(one.tokens, one.finish) for one in found] == [(one.tokens, one.finish) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert len(one.logprobs) == len(one.tokens)
        assert_close(one.logprobs, other.logprobs)
        assert_close(one.prompt_logprobs, other.prompt_logprobs)


def assert_close(found: tuple[TokenLogprobs, ...], wanted: tuple[TokenLogprobs, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, rel=0, abs=ROUNDING)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], rel=0, abs=ROUNDING)


@pytest.mark.parametrize("sides", KINDS, indirect=True)
@pytest.mark.parametrize("how", [SAMPLED, pytest.param({}, marks=pytest.mark.long)], ids=["seeded", "greedy"])
@pytest.mark.parametrize("length", [39, *(pytest.param(length, marks=pytest.mark.long) for length in (1, 16))])
def test_one_answer_computed_in_two_places_equals_that_of_one_place_bit_for_bit(sides, how, length):
    """One request alone: the order of arithmetic is the same."""
    params = SamplingParams(max_tokens=NUM_TOKENS, logprobs=3, prompt_logprobs=0, **how)
    found = sides.apart(row(length), params)
    assert found == sides.one_place.generate([row(length)], params)
    assert len(found[0].prompt_logprobs) == length - 1
    assert len(set(found[0].tokens)) >= 6


@pytest.mark.parametrize("sides", KINDS, indirect=True)
def test_several_seeded_answers_computed_in_two_places_equal_those_of_one_place(sides):
    params = SamplingParams(max_tokens=NUM_TOKENS, n=3, logprobs=2, **SAMPLED)
    found = sides.apart(row(37), params)
    assert_same(found, sides.one_place.generate([row(37)], params))
    assert len({one.tokens for one in found}) == 3
    assert all(len(set(one.tokens)) >= 6 for one in found)


@pytest.mark.parametrize("sides", KINDS, indirect=True)
def test_answers_under_a_grammar_computed_in_two_places_equal_those_of_one_place(sides, tokenizer):
    grammar = Grammar("regex", r"(red|green) [a-f]{4}-\d{2}")
    params = SamplingParams(max_tokens=40, n=2, logprobs=2, grammar=grammar, **SAMPLED)
    prompt = tokenizer("import os, threading")["input_ids"]
    found = sides.apart(prompt, params)
    assert_same(found, sides.one_place.generate([prompt], params))
    assert {one.finish for one in found} == {"stop"}
    assert all(tokenizer.decode(one.tokens).startswith(("red ", "green ")) for one in found)
