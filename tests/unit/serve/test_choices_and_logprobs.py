"""Several answers and their log-probabilities over HTTP are the model's own, also when a worker dies on the way."""

from __future__ import annotations

import json
from typing import Any

import llguidance.hf
import pytest
import torch
from tests.unit.serve.in_process import ENGINE
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import EngineConfig
from farspan.engine.detokenize import AnswerText
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.models.checkpoint import load_causal_lm

PROMPT, MAX_TOKENS = TEXT[300:420], 14
# Attention over pages adds up in another order than transformers does; both in float64.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def teacher(oracle):
    """log-probabilities of transformers for every next token of a text, given as tokens."""
    model, _ = oracle

    def logprobs(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logprobs


@pytest.fixture(scope="module")
def token_bytes(oracle):
    """By llguidance's reading of the tokenizer, which is not ours."""
    reader = llguidance.hf.from_tokenizer(oracle[1])
    return lambda token: bytes(reader.decode_bytes([int(token)]))


@pytest.fixture(scope="module")
def expected(tiny_folder, oracle):
    """Tokens the engine itself answers in one plain process, choice by choice."""
    _, tokenizer = oracle
    engine = Engine(load_causal_lm(tiny_folder, torch.float64), EngineConfig(**ENGINE), tokenizer=tokenizer)

    def answers(n: int, seed: int, **more: Any) -> list[list[int]]:
        params = SamplingParams(n=n, seed=seed, temperature=1.0, max_tokens=MAX_TOKENS, **more)
        found = [list(done.tokens) for done in engine.generate([tokenizer(PROMPT)["input_ids"]], params)]
        assert len({tuple(tokens) for tokens in found}) == n, "choices that are all the same prove nothing"
        return found

    return answers


@pytest.mark.parametrize("die_after", [None, 2, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_its_own_tokens_and_transformers_logprobs_also_after_a_death(
    served, oracle, teacher, token_bytes, stream, die_after
):
    _, tokenizer = oracle
    served.workers.die_after = die_after

    async def work(client):
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x"}],
            "n": 3,
            "seed": 11,
            "temperature": 1.0,
            "max_completion_tokens": MAX_TOKENS,
            "logprobs": True,
            "top_logprobs": 4,
        }
        if not stream:
            answer = await client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
            return [
                (c.message.content, c.logprobs.content, c.model_extra["token_ids"]) for c in answer.choices
            ], answer.usage
        parts = {i: ["", [], []] for i in range(3)}
        usage = None
        chunks = await client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True}
        )
        async for chunk in chunks:
            usage = chunk.usage or usage
            for c in chunk.choices:
                parts[c.index][0] += c.delta.content or ""
                parts[c.index][1] += c.logprobs.content
                parts[c.index][2] += c.model_extra["token_ids"]
        return [tuple(parts[i]) for i in range(3)], usage

    choices, usage = served.ask(work)
    assert served.workers.deaths == (0 if die_after is None else 3)
    prompt_ids = tokenizer("user: x\nassistant:", add_special_tokens=False)["input_ids"]
    assert usage.prompt_tokens == len(prompt_ids)
    assert usage.completion_tokens == sum(len(tokens) for _, _, tokens in choices)
    assert len({tuple(tokens) for _, _, tokens in choices}) == 3
    for text, logprobs, tokens in choices:
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert len(logprobs) == len(tokens)
        wanted = teacher([*prompt_ids, *tokens])
        for place, (told, token) in enumerate(zip(logprobs, tokens, strict=True)):
            row = wanted[len(prompt_ids) - 1 + place]
            assert told.logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
            assert bytes(told.bytes) == token_bytes(token)
            values, order = row.topk(4)
            assert [top.logprob for top in told.top_logprobs] == pytest.approx(values.tolist(), abs=TOLERANCE)
            assert [bytes(top.bytes) for top in told.top_logprobs] == [token_bytes(t) for t in order]


@pytest.mark.parametrize("die_after", [None, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_sampled_choices_of_a_completion_are_those_of_one_plain_engine(served, expected, oracle, stream, die_after):
    _, tokenizer = oracle
    served.workers.die_after = die_after

    async def work(client):
        asked = {"model": "tiny", "prompt": PROMPT, "n": 4, "seed": 5, "max_tokens": MAX_TOKENS}
        if not stream:
            return [c.text for c in (await client.completions.create(**asked)).choices]
        texts = ["", "", "", ""]
        async for chunk in await client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    wanted = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected(4, 5)]
    assert served.ask(work) == wanted


@pytest.mark.parametrize("max_tokens", [0, 6])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_transformers_logprobs_and_offsets_that_cut_the_text_at_its_tokens(
    served, oracle, teacher, stream, max_tokens
):
    _, tokenizer = oracle
    prompt_ids = tokenizer(PROMPT)["input_ids"]

    async def work(client):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "echo": True, "logprobs": 2}
        asked["temperature"] = 0
        if not stream:
            answer = await client.completions.create(**asked)
            assert answer.usage.completion_tokens == max_tokens
            return answer.choices[0].text, answer.choices[0].logprobs
        text, told = "", None
        async for chunk in await client.completions.create(**asked, stream=True):
            text += chunk.choices[0].text
            more = chunk.choices[0].logprobs
            if told is None:
                told = more
            else:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    getattr(told, name).extend(getattr(more, name))
        return text, told

    text, told = served.ask(work)
    assert text.startswith(PROMPT)
    assert (text == PROMPT) == (max_tokens == 0)
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(prompt_ids) + max_tokens
    assert told.token_logprobs[0] is None
    answered = tokenizer(text)["input_ids"]
    if answered[: len(prompt_ids)] == prompt_ids and len(answered) == len(told.tokens):
        pieces = [text[a:b] for a, b in zip(told.text_offset, [*told.text_offset[1:], len(text)], strict=True)]
        assert pieces == told.tokens
    wanted = teacher(prompt_ids)
    for place in range(1, len(prompt_ids)):
        row = wanted[place - 1]
        assert told.token_logprobs[place] == pytest.approx(row[prompt_ids[place]].item(), abs=TOLERANCE)
        assert max(told.top_logprobs[place].values()) == pytest.approx(row.max().item(), abs=TOLERANCE)


def test_prompts_of_one_request_are_answered_in_their_order_and_counted_once_each(served, oracle):
    _, tokenizer = oracle
    prompts = [TEXT[:60], TEXT[200:240], TEXT[500:590]]

    async def work(client):
        answer = await client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=5, temperature=0)
        alone = [
            (await client.completions.create(model="tiny", prompt=p, max_tokens=5, temperature=0)).choices[0].text
            for p in prompts
        ]
        return answer, alone

    answer, alone = served.ask(work)
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == sum(len(tokenizer(p)["input_ids"]) for p in prompts)
    assert answer.usage.completion_tokens == 6 * 5


def test_a_stop_string_ends_each_choice_before_it_and_nothing_more_is_computed(served, oracle):
    async def work(client):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
        on = {"ignore_eos": True}
        whole = (await client.completions.create(**asked, extra_body=on)).choices[0].text
        stop = whole[8:10]
        cut = await client.completions.create(**asked, stop=[stop, "never there"], extra_body=on)
        late = await client.completions.create(**asked, stop=stop, extra_body={**on, "min_tokens": 29})
        return whole, stop, cut, late

    whole, stop, cut, late = served.ask(work)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 30
    # Not looked for among the first tokens.
    assert len(late.choices[0].text) > len(cut.choices[0].text)
    assert whole.startswith(late.choices[0].text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_is_asked_for_ends_each_text_and_changes_no_token_and_no_logprob(served, oracle, stream):
    _, tokenizer = oracle
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "n": 3, "seed": 2, "logprobs": 1, "stop": ["e", "t"],
            "return_token_ids": True, "stream": stream}  # fmt: skip
    cut, shown = (
        choices_of(served.post("/v1/completions", {**body, "include_stop_str_in_output": wanted}), stream)
        for wanted in (False, True)
    )
    assert [choice["finish"] for choice in cut] == ["stop"] * 3
    for one, other in zip(cut, shown, strict=True):
        assert {**other, "text": one["text"]} == one
        assert other["text"] in (one["text"] + "e", one["text"] + "t")
        # As the tokens have it, but for what the last of them says after it.
        assert tokenizer.decode(other["token_ids"]).startswith(other["text"])
        assert not set("et") & set(one["text"])


def choices_of(answer, stream: bool) -> list[dict]:
    """Text, tokens, log-probabilities and end of each choice."""
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event) for event in events] if stream else [answer.json()]
    found = [{"text": "", "token_ids": [], "offsets": [], "logprobs": [], "finish": None} for _ in range(3)]
    for choice in (choice for part in parts for choice in part["choices"]):
        one = found[choice["index"]]
        one["text"] += choice["text"]
        one["token_ids"] += choice["token_ids"]
        one["offsets"] += choice["logprobs"]["text_offset"]
        one["logprobs"] += choice["logprobs"]["token_logprobs"]
        one["finish"] = choice["finish_reason"]
    return found


@pytest.mark.parametrize("die_after", [None, 3])
def test_with_allowed_tokens_and_bad_words_choices_are_those_of_one_plain_engine(served, expected, oracle, die_after):
    _, tokenizer = oracle
    served.workers.die_after = die_after
    allowed = list(range(60, 90))
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "n": 2, "seed": 3,
            "allowed_token_ids": allowed, "return_token_ids": True}  # fmt: skip
    free = [choice["token_ids"] for choice in served.post("/v1/completions", body).json()["choices"]]
    assert free == expected(2, 3, allowed_token_ids=frozenset(allowed))
    assert set(free[0] + free[1]) <= set(allowed)
    word = next(token for token in free[0][4:] if tokenizer(tokenizer.decode([token]))["input_ids"] == [token])
    asked = {**body, "bad_words": [tokenizer.decode([word])]}
    held = [choice["token_ids"] for choice in served.post("/v1/completions", asked).json()["choices"]]
    assert set(held[0] + held[1]) <= set(allowed) - {word}
    assert held == expected(2, 3, allowed_token_ids=frozenset(allowed), bad_words=tuple(asked["bad_words"]))
    assert served.workers.deaths == (0 if die_after is None else 4)


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "must name at least one token; leave it out to allow all"),
        ({"allowed_token_ids": [1] * 10_001}, "allowed_token_ids", "at most 10000 items"),
        ({"allowed_token_ids": [400]}, "allowed_token_ids", "must name tokens of the vocabulary 0..399, got [400]"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids.0", "valid integer"),
        ({"bad_words": "word"}, "bad_words", "valid list"),
        ({"bad_words": [""]}, "bad_words.0", "at least 1 character"),
        ({"bad_words": ["a" * 101]}, "bad_words.0", "at most 100 characters"),
        ({"bad_words": ["a"] * 1001}, "bad_words", "at most 1000 items"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output", "valid boolean"),
        ({"allowed_token_ids": [0], "min_tokens": 2}, None, "no token is allowed here by min_tokens, allowed_token"),
    ],
)
def test_tokens_and_words_that_cannot_be_kept_to_are_refused_by_name(served, fields, param, rule):
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert rule in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("stream", [False, True])
def test_what_ended_an_answer_is_told_where_the_client_asked_for_it(served, oracle, stream):
    _, tokenizer = oracle
    end = tokenizer.eos_token_id

    def reason(**fields: Any) -> Any:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 2, "stream": stream, "logprobs": 0}
        answer = served.post("/v1/completions", {**body, **fields})
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [json.loads(line) for line in lines] if stream else [answer.json()]
        *before, last = [part["choices"][0] for part in parts]
        assert all(choice["stop_reason"] is None for choice in before)
        return last["finish_reason"], last["stop_reason"]

    assert reason(max_tokens=3, stop_token_ids=[5]) == ("length", None)
    assert reason(stop=["e", "t"]) in (("stop", "e"), ("stop", "t"))
    assert reason(stop=["zz", "%"], logit_bias={"5": 100}) == ("stop", "%")
    assert reason(stop=["%%%", "%%"], logit_bias={"5": 100}) == ("stop", "%%")
    assert reason(stop_token_ids=[7, 5], logit_bias={"5": 100}) == ("stop", 5)
    # The end of the text is nothing the client asked for, unless nothing else ends at it.
    ends = {"logit_bias": {str(end): 100}, "stop_token_ids": [end]}
    assert reason(**ends) == ("stop", None)
    assert reason(**ends, ignore_eos=True) == ("stop", end)


def test_a_prompt_that_is_only_looked_at_ends_by_its_length_whatever_would_have_come(served, oracle):
    end = oracle[1].eos_token_id
    body = {"model": "tiny", "prompt": "x", "max_tokens": 0, "echo": True, "logit_bias": {str(end): 100}}
    for more in ({}, {"stop_token_ids": [5], "logit_bias": {"5": 100}}, {"stop": "%", "logit_bias": {"5": 100}}):
        choice = served.post("/v1/completions", {**body, **more}).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("x", "length", None)


def test_fields_of_other_servers_reach_the_engine_by_their_names(served):
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 2,
        "top_k": 7,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": 3, "6": -2.5},
        "min_tokens": 1,
        "stop": "zzz",
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "allowed_token_ids": [7, 9, 7],
        "bad_words": ["import", "os"],
        "seed": -9,
        "ignore_eos": True,
        "top_p": 0.9,
        "temperature": 0.7,
    }
    answer = served.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    params = served.workers.asked[0].params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (7, 0.05, 1.2, 1)
    assert (params.presence_penalty, params.frequency_penalty, params.seed) == (0.5, -0.5, -9)
    assert dict(params.logit_bias) == {5: 3.0, 6: -2.5}
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("zzz",), frozenset({3}), True)
    assert (params.include_stop_str_in_output, params.bad_words) == (True, ("import", "os"))
    assert params.allowed_token_ids == {7, 9}
    assert (params.top_p, params.temperature, params.max_tokens) == (0.9, 0.7, 2)
    assert "x-farspan-ignored" not in answer.headers
    assert served.post("/v1/completions", {**body, "top_k": -1}).status_code == 200


def test_names_nobody_knows_and_hints_are_passed_over_and_told_in_a_header(served):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "reasoning_effort": "high",
        "store": True,
        "user": "somebody",
        "nobody knows\r\nset-cookie: a=b": 1,
        "nobody_knows": {"a": [1]},
        "metadata": None,
    }
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farspan-ignored"] == "store, user, nobody_knows, reasoning_effort"
    assert "set-cookie" not in answer.headers
    streamed = served.post("/v1/chat/completions", {**body, "stream": True})
    assert streamed.headers["x-farspan-ignored"] == answer.headers["x-farspan-ignored"]
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_an_impossible_token_is_told_in_json_that_every_client_reads(served):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "logprobs": 3, "logit_bias": {"5": -100}}
    answer = served.post("/v1/completions", body)
    json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_tokens_become_text_one_by_one_only_where_a_client_asks_where_each_begins(served, monkeypatch):
    seen: list[bool] = []

    class Seen(AnswerText):
        def __init__(self, *arguments: Any, by_token: bool, **more: Any) -> None:
            seen.append(by_token)
            super().__init__(*arguments, by_token=by_token, **more)

    monkeypatch.setattr("farspan.serve.answering.AnswerText", Seen)
    for more in ({}, {"logprobs": 0}, {"stop": ["never"]}):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **more}
        choice = served.post("/v1/completions", body).raise_for_status().json()["choices"][0]
        assert ("text_offset" in (choice["logprobs"] or {})) == ("logprobs" in more)
    # With stop strings it does so by itself.
    assert seen == [False, True, False]
