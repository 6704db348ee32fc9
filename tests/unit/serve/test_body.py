"""A request asks for what is served, or is told which field is not and what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest
from farspan.serve.reply import model_entries
from farspan.serve.shape import ApiError
from farspan.serve.wire import CompletionRequest

GOOD = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def refused(content: bytes, shape=CompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as problem:
        read_body(content, shape)
    error = problem.value
    # What is sent must be sendable.
    json.dumps(error.body(), ensure_ascii=False).encode("utf-8")
    assert error.status == 400
    return error


UNSERVED = [
    ("suffix", "end"),
    ("prompt_logprobs", 1),
    ("functions", [{"name": "f"}]),
    ("audio", {"voice": "any"}),
    ("modalities", ["text", "audio"]),
    ("use_beam_search", True),
    ("chat_template", "{{ messages }}"),
    ("documents", [{"text": "x"}]),
    ("length_penalty", 0.5),
    ("guided_whitespace_pattern", " *"),
    ("thinking_token_budget", 0),
    ("moderation", {"model": "m"}),
    ("logprob_token_ids", [1]),
    ("return_tokens_as_token_ids", True),
    ("regex", "a+"),
]


@pytest.mark.parametrize(("field", "value"), UNSERVED)
@pytest.mark.parametrize(("good", "shape"), [(GOOD, CompletionRequest), (CHAT, ChatRequest)])
def test_a_known_field_that_is_not_served_is_refused_by_name_with_the_way_out(good, shape, field, value):
    error = refused(json.dumps({**good, field: value}).encode(), shape)
    assert error.param == field
    assert error.message.startswith(f"{field}: ")
    assert "leave it out" in error.message


@pytest.mark.parametrize(("good", "shape"), [(GOOD, CompletionRequest), (CHAT, ChatRequest)])
def test_neutral_values_unknown_fields_and_nulls_ask_for_the_default(good, shape):
    neutral = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "suffix": "",
        "logprobs": False,
        "functions": [],
        "bad_words": [],
        "length_penalty": 1,
        "thinking_token_budget": -1,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "truncation_side": "left",
        "kv_transfer_params": {},
        "n": 1,
        "nobody_knows_this": [1],
    }
    names = [*shape.model_fields, *neutral]
    nulls = {name: None for name in names if name not in good}
    plain, ignored = read_body(json.dumps(good).encode(), shape)
    assert ignored == ()
    assert read_body(json.dumps({**good, **neutral}).encode(), shape) == (plain, ("nobody_knows_this",))
    assert read_body(json.dumps({**good, **nulls}).encode(), shape) == (plain, ())
    assert plain.temperature == 1.0
    assert plain.stop == []


def test_a_field_that_is_needed_may_not_be_null():
    assert refused(json.dumps({**GOOD, "prompt": None}).encode()).param == "prompt"


@pytest.mark.parametrize(
    ("good", "shape", "field", "value"),
    [
        (GOOD, CompletionRequest, "prompt", "a\ud800b"),
        (GOOD, CompletionRequest, "prompt", ["\udfff"]),
        (GOOD, CompletionRequest, "stop", ["ok", "\udc00"]),
        (GOOD, CompletionRequest, "model", "\ud83d"),
        (CHAT, ChatRequest, "messages", [{"role": "user", "content": "\ud83d"}]),
        (CHAT, ChatRequest, "messages", [{"role": "user", "content": [{"type": "text", "text": "\ude00"}]}]),
    ],
)
def test_half_a_character_is_refused_and_a_whole_one_is_taken(good, shape, field, value):
    error = refused(json.dumps({**good, field: value}).encode(), shape)
    assert (error.param, "surrogate" in error.message) == (field, True)
    whole, _ = read_body(json.dumps({**GOOD, "prompt": "\U0001f600"}).encode(), CompletionRequest)
    assert whole.prompt == ["\U0001f600"]


def test_a_name_that_is_half_a_character_and_bytes_that_are_no_text_are_refused():
    assert refused(json.dumps({**GOOD, "\ud800": 1}).encode()).param == "body"
    assert refused(b'{"model": "m", "prompt": "\xed\xa0\x80"}').code == "invalid_json"
    assert refused(b"{not json").code == "invalid_json"
    assert refused(b"[" * 100_000).code == "invalid_json"
    assert refused(b'{"model": "m", "prompt": "x", "temperature": NaN}').code == "invalid_json"
    assert refused(b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}").code == "invalid_json"
    deep = b'{"model": "m", "prompt": "x", "metadata": ' + b"[" * 200 + b"]" * 200 + b"}"
    assert refused(deep).param == "metadata"
    assert refused(b"[1]").param == "body"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["a"] * 17),
        ("stop", "a" * 1001),
        ("stop", ["a", "b" * 1001]),
        ("stop_token_ids", list(range(1001))),
        ("temperature", 9),
        ("presence_penalty", -3),
        ("frequency_penalty", 2.5),
        ("repetition_penalty", 0),
        ("min_p", 1.1),
        ("min_tokens", -1),
        ("logit_bias", {"7": 101}),
        ("logit_bias", {"seven": 1}),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "no schema"}}),
        ("top_p", 0),
        ("max_tokens", 0),
        ("prompt", {"a": 1}),
        ("prompt", ["a", 1]),
        ("prompt", ["a"] * 129),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", "2"),
        ("n", 1.5),
        ("best_of", 3),
        ("echo", 1),
        ("logprobs", True),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stream", "yes"),
        ("temperature", "hot"),
        ("seed", 2**63),
        ("top_k", -2),
        ("priority", 1.5),
        ("deadline_s", 0),
        ("cache_salt", ""),
        ("stream_options", [1]),
        ("guided_choice", []),
        ("guided_regex", 7),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(field, value):
    error = refused(json.dumps({**GOOD, field: value}).encode())
    assert str(error.param).startswith((field, "n", "structured_outputs")), error.message
    assert field.removeprefix("guided_") in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, ".0.type"),
        ({"type": ["text"], "text": "x"}, ".0.type"),
        ({"text": "x"}, ".0.type"),
        ({"type": "text"}, ".0"),
        ({"type": "text", "text": None}, ".0"),
        ({"type": "text", "text": "x", "refusal": "y"}, ".0"),
        ({"type": "refusal", "text": "x"}, ".0"),
        ("words", ".0"),
    ],
)
def test_content_that_is_not_text_is_refused_by_its_place(part, param):
    messages = [{"role": "user", "content": [part]}]
    error = refused(json.dumps({**CHAT, "messages": messages}).encode(), ChatRequest)
    assert error.param == f"messages.0.content{param}"


@pytest.mark.parametrize("chats", [True, False])
def test_the_model_list_says_whether_the_model_chats(chats):
    (entry,) = model_entries(["m"], 1, 64, chat_template=chats)
    assert SimpleNamespace(**entry).chat_template is chats


@pytest.mark.parametrize(("good", "shape"), [(GOOD, CompletionRequest), (CHAT, ChatRequest)])
def test_penalties_bias_and_the_form_of_the_answer_are_taken_by_their_openai_names(good, shape):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "logit_bias": {"50": -100, "7": 2.5},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    }
    read, _ = read_body(json.dumps({**good, **asked}).encode(), shape)
    assert (read.presence_penalty, read.frequency_penalty, read.logit_bias) == (0.5, -1.0, {50: -100.0, 7: 2.5})
    assert read.form().kind == "json_schema"
    assert json.loads(read.form().source) == schema
    any_object, _ = read_body(json.dumps({**good, "response_format": {"type": "json_object"}}).encode(), shape)
    assert any_object.form().kind == "json_object"
