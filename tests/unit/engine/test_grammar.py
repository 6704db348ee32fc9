"""An answer that must fit a grammar fits it, wherever it is resumed; a grammar that cannot be met is that request's."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tests.unit.engine.tiny import engine_config, prompts, tiny_model
from tests.unit.engine.worded import worded_model

from farspan.engine.engine import Engine
from farspan.engine.grammar import GrammarCompiler, allowed_tokens
from farspan.engine.request import FailedEvent, Grammar, SamplingParams
from farspan.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CALL = 'start: verb " " NUMBER ("," NUMBER)*\nverb: "add" | "take"\nNUMBER: /[0-9]{1,3}/'


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_model(tmp_path_factory.mktemp("worded"))


@pytest.fixture(scope="module")
def engine(worded):
    model, tokenizer = worded
    return Engine(model, engine_config(), tokenizer=tokenizer)


def text_of(tokenizer, tokens) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_answers_of_a_random_model_fit_their_grammar_side_by_side(worded, engine, temperature):
    tokenizer = worded[1]
    prompt = tokenizer("import os")["input_ids"]
    grammars = {
        "schema": Grammar("json_schema", json.dumps(PERSON)),
        "regex": Grammar("regex", r"(red|green) [a-f]{4}-\d{2}"),
        "lark": Grammar("lark", CALL),
        "free": None,
    }
    tokens: dict[str, list[int]] = {name: [] for name in grammars}
    finishes = {}
    for number, (name, grammar) in enumerate(grammars.items()):
        params = SamplingParams(max_tokens=200, temperature=temperature, seed=number, grammar=grammar)
        engine.add(name, prompt, params)
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event
            tokens[event.request_id].append(event.token)
            finishes[event.request_id] = event.finish
    person = json.loads(text_of(tokenizer, tokens["schema"]))
    assert set(person) == {"name", "age", "tags"}
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 130
    assert set(person["tags"]) <= {"a", "b"}
    assert re.fullmatch(r"(red|green) [a-f]{4}-\d{2}", text_of(tokenizer, tokens["regex"]))
    assert (finishes["schema"], finishes["regex"]) == ("stop", "stop")
    assert re.match(r"(add|take) \d", text_of(tokenizer, tokens["lark"]))
    alone = engine.generate([prompt], SamplingParams(max_tokens=200, temperature=temperature, seed=3))[0]
    assert list(alone.tokens) == tokens["free"]


def test_an_answer_under_a_grammar_goes_on_the_same_after_any_token(worded, engine):
    tokenizer = worded[1]
    prompt = tokenizer("class Person:")["input_ids"]
    grammar = Grammar("json_schema", json.dumps(PERSON))
    params = SamplingParams(max_tokens=200, temperature=1.3, seed=5, grammar=grammar, presence_penalty=0.1)
    whole = engine.generate([prompt], params)[0]
    assert len(set(whole.tokens)) >= 6
    for cut in range(1, len(whole.tokens)):
        engine.add("r", prompt, params, answered=whole.tokens[:cut])
        rest = [event for _ in range(len(whole.tokens) - cut) for event in engine.step()]
        assert [event.token for event in rest] == list(whole.tokens[cut:])
        assert rest[-1].finish == "stop"
    assert not engine.has_work
    assert engine.pool.num_held == 0


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", r"(red|green) [a-f]{4}-\d{2}"),
        Grammar("lark", CALL),
        Grammar("regex", r"(é|日本|\"[^\"]*\")+;"),
    ],
)
def test_the_mask_holds_the_tokens_that_can_be_accepted_and_going_back_restores_it(worded, grammar):
    """Each token of the vocabulary is tried; where the text is forced, the mask holds one way to spell it."""
    tokenizer = worded[1]
    vocab_size = len(tokenizer) + 3
    matcher = GrammarCompiler(tokenizer, vocab_size, frozenset({tokenizer.eos_token_id})).start("r", grammar)
    generator = torch.Generator().manual_seed(1)
    num_compared = 0
    for _ in range(12):
        if matcher.ended:
            break
        allowed = allowed_tokens([matcher], vocab_size)[0]
        tried = [matcher.fits([token]) == 1 for token in range(vocab_size)]
        if int(allowed.sum()) == 1:
            assert tried[int(allowed.nonzero())]
        else:
            assert allowed.tolist() == tried
            num_compared += 1
        assert not allowed[len(tokenizer) :].any()
        for token in allowed.nonzero()[:, 0].tolist()[:5]:
            matcher.accept(token)
            matcher.rollback(1)
            assert torch.equal(allowed_tokens([matcher], vocab_size)[0], allowed)
        choices = [t for t in allowed.nonzero()[:, 0].tolist() if t != tokenizer.eos_token_id]
        matcher.accept(choices[int(torch.randint(len(choices), (1,), generator=generator))])
    assert num_compared >= 3


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", "{not json"), "json_schema cannot be read"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "json_schema is impossible"),
        (Grammar("json_schema", '{"$ref": "http://elsewhere/schema"}'), "json_schema is impossible"),
        (Grammar("regex", "a(b"), "regex is impossible"),
        (Grammar("regex", r"a(?!b)c"), "look-around"),
        (Grammar("regex", r"[^\s\S]"), "allows no token"),
        (Grammar("lark", "start: nobody"), "unknown name"),
        (Grammar("lark", "not a grammar"), "lark is impossible"),
    ],
)
def test_an_impossible_grammar_is_refused_with_the_reason_and_the_others_go_on(worded, engine, grammar, reason):
    prompt = worded[1]("x = ")["input_ids"]
    expected = list(engine.generate([prompt], SamplingParams())[0].tokens)
    engine.add("good", prompt, SamplingParams())
    with pytest.raises(RequestError, match=reason) as problem:
        engine.add("bad", prompt, SamplingParams(grammar=grammar))
    assert "\n" not in str(problem.value)
    assert [event.token for _ in range(16) for event in engine.step()] == expected
    assert engine.pool.num_held == 0


def test_a_grammar_needs_a_tokenizer_and_tokens_that_fit_it(worded, engine):
    grammar = Grammar("regex", "[0-9]+")
    bare = Engine(tiny_model(), engine_config())
    with pytest.raises(RequestError, match="without a tokenizer"):
        bare.add("r", prompts(4)[0], SamplingParams(grammar=grammar))
    letters = worded[1]("abc")["input_ids"]
    with pytest.raises(RequestError, match="grammar"):
        engine.add("r", letters, SamplingParams(grammar=grammar), answered=letters[:1])


def test_a_grammar_that_leaves_nothing_for_a_biased_row_fails_that_row_alone(worded, engine):
    """Nothing but an end may follow, and min_tokens forbids the end."""
    prompt = worded[1]("x = ")["input_ids"]
    engine.add("bad", prompt, SamplingParams(min_tokens=5, grammar=Grammar("regex", "")))
    engine.add("good", prompt, SamplingParams())
    events = [event for _ in range(17) for event in engine.step()]
    failed = [event for event in events if isinstance(event, FailedEvent)]
    assert [event.request_id for event in failed] == ["bad"]
    assert "no token is allowed" in str(failed[0].error)
    assert len(events) == 17
    assert engine.pool.num_held == 0
