"""What a request asks for beside tokens: penalties, lengths, several answers, log-probabilities, stop strings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.engine.tiny import VOCAB, engine_config, prompts, tiny_model
from tests.unit.engine.worded import worded_model

from farspan.engine.engine import Engine
from farspan.engine.probe import plain_logits
from farspan.engine.request import SamplingParams, TokenEvent, choices
from farspan.errors import RequestError


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_model(tmp_path_factory.mktemp("worded"))


EVERYTHING = SamplingParams(
    max_tokens=24,
    min_tokens=10,
    temperature=1.1,
    top_p=0.97,
    top_k=60,
    min_p=0.001,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    logit_bias=((7, 1.0), (11, -3.0)),
    seed=2**63 + 5,
    request=3,
    choice=2,
    logprobs=4,
)


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        (
            SamplingParams(max_tokens=24, repetition_penalty=1.4, ignore_eos=True),
            {"repetition_penalty": 1.4, "eos_token_id": -1},
        ),
        (SamplingParams(max_tokens=24, min_tokens=18), {"min_new_tokens": 18}),
        (
            SamplingParams(max_tokens=24, logit_bias=((4, 3.0), (8, -2.0)), repetition_penalty=0.8),
            {"sequence_bias": {(4,): 3.0, (8,): -2.0}, "repetition_penalty": 0.8},
        ),
    ],
)
def test_greedy_answers_equal_transformers_generate_with_the_same_wishes(params, settings):
    model = tiny_model(eos_token_id=[95, 49, 90, 3], seed=4)
    prompt = prompts(19)[0]
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    asked = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0, **settings)
    expected = asked[0, len(prompt) :].tolist()
    assert expected != plain[0, len(prompt) :].tolist()
    assert len(set(expected)) >= 6
    answer = Engine(model, engine_config(max_batch_tokens=8)).generate([prompt], params)[0]
    assert list(answer.tokens) == expected


def test_an_answer_with_every_wish_goes_on_the_same_after_any_token_in_another_engine():
    prompt = prompts(21)[0]
    engine = Engine(tiny_model(), engine_config())
    engine.add("whole", prompt, EVERYTHING)
    whole = [event for _ in range(24) for event in engine.step()]
    tokens = [event.token for event in whole]
    assert len(set(tokens)) >= 10
    for cut in range(1, 24):
        other = Engine(tiny_model(), engine_config(max_batch_tokens=5)) if cut % 8 == 0 else engine
        other.add("resumed", prompt, EVERYTHING, answered=tokens[:cut])
        other.add("beside", prompt[::-1], replace(EVERYTHING, seed=cut))
        rest = [event for _ in range(90) for event in other.step() if event.request_id == "resumed"]
        assert [event.token for event in rest] == tokens[cut:]
        for found, expected in zip(rest, whole[cut:], strict=True):
            assert found.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-9)
        other.check_integrity()
        assert other.pool.num_held == 0


def test_the_answers_to_one_prompt_differ_and_each_is_its_own_request():
    engine = Engine(tiny_model(), engine_config())
    params = SamplingParams(max_tokens=12, temperature=1.2, seed=9, n=4)
    asked = prompts(9, 14)
    completions = engine.generate(asked, params)
    assert len(completions) == 8
    assert len({completion.tokens for completion in completions}) == 8
    # The third answer to the second prompt, alone and split.
    request_id, third = choices("x", replace(params, request=1))[2]
    engine.add(request_id, asked[1], third, answered=completions[6].tokens[:5])
    assert [e.token for _ in range(7) for e in engine.step()] == list(completions[6].tokens[5:])
    assert request_id == "x/2"
    with pytest.raises(RequestError, match="choices"):
        engine.add("y", asked[0], params)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
def test_log_probabilities_of_prompt_and_answer_equal_those_of_transformers(max_batch_tokens):
    model = tiny_model()
    asked = prompts(1, 33, 50)
    engine = Engine(model, engine_config(max_batch_tokens=max_batch_tokens))
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=3, logprobs=2, prompt_logprobs=3)
    for prompt, answer in zip(asked, engine.generate(asked, params), strict=True):
        whole = [*prompt, *answer.tokens]
        expected = plain_logits(model, torch.tensor(whole)).log_softmax(-1)
        found = [*answer.prompt_logprobs, *answer.logprobs]
        assert [each.token for each in found] == whole[1:]
        for position, each in enumerate(found):
            assert each.logprob == pytest.approx(float(expected[position, each.token]), abs=1e-9)
            values, order = expected[position].topk(3 if position + 1 < len(prompt) else 2)
            assert [token for token, _ in each.top] == order.tolist()
            assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_log_probabilities_of_a_prompt_survive_a_preemption_in_the_middle_of_it():
    model = tiny_model()
    prompt = prompts(40)[0]
    engine = Engine(model, engine_config(max_batch_tokens=16))
    params = SamplingParams(max_tokens=2, prompt_logprobs=0)
    expected = engine.generate([prompt], params)[0].prompt_logprobs
    engine.add("r", prompt, params)
    assert engine.step() == []
    engine._preempt(engine._running[0], offload=False)
    events = [event for _ in range(5) for event in engine.step()]
    assert isinstance(events[0], TokenEvent)
    found = events[0].prompt_logprobs
    assert len(found) == 39
    assert [each.token for each in found] == prompt[1:]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected], abs=1e-9)
    assert events[1].prompt_logprobs is None


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(worded):
    model, tokenizer = worded
    engine = Engine(model, engine_config(), tokenizer=tokenizer)
    prompt = tokenizer("def run(self):")["input_ids"]
    free = list(engine.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0].tokens)
    text = tokenizer.decode(free)
    stop = text[11:15]
    assert stop not in text[:14]
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop=("never there", stop))
    answer = engine.generate([prompt], params)[0]
    ended = tokenizer.decode(list(answer.tokens))
    assert answer.finish == "stop"
    assert list(answer.tokens) == free[: len(answer.tokens)]
    assert stop in ended
    assert stop not in tokenizer.decode(list(answer.tokens[:-1]))
    # Also when the stop string began before the request was resumed.
    engine.add("r", prompt, params, answered=answer.tokens[:-1])
    assert [(e.token, e.finish) for e in engine.step()] == [(answer.tokens[-1], "stop")]
    # And not before min_tokens.
    longer = engine.generate([prompt], replace(params, min_tokens=len(answer.tokens) + 5))[0]
    assert list(longer.tokens[: len(answer.tokens)]) == free[: len(answer.tokens)]
    assert len(longer.tokens) >= len(answer.tokens) + 5


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\], got 1.5"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias must name tokens of the vocabulary"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias must be finite"),
        ({"min_tokens": 17}, "min_tokens must lie in 0..max_tokens=16"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"stop": ("",)}, "empty string"),
        ({"stop": ("x",)}, "without a tokenizer"),
        ({"choice": -1}, "choice"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_for_its_request_alone(given, reason):
    engine = Engine(tiny_model(), engine_config())
    good = prompts(6)[0]
    expected = list(engine.generate([good], SamplingParams())[0].tokens)
    engine.add("good", good, SamplingParams())
    with pytest.raises(RequestError, match=reason):
        engine.add("bad", [1, 2], SamplingParams(**given))
    assert [event.token for _ in range(16) for event in engine.step()] == expected
    assert engine.pool.num_held == 0
