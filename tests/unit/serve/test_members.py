"""What the parts of a conversation say is served, told as passed over, or refused by name."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import openai.types.chat as chat_types
import pytest
from tests.unit.serve.in_process import Served

from farspan.serve.body import ignored_header, read_body
from farspan.serve.conversation import ChatRequest, Tool
from farspan.serve.shape import ApiError


def asked(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [*messages, {"role": "user", "content": "x"}], "max_tokens": 1, **more}


def prompt_of(served: Served, *messages: dict[str, Any]) -> str:
    """What a model is shown of them."""
    tokens = served.post("/tokenize", {"model": "tiny", "messages": list(messages)}).json()["tokens"]
    text: str = served.post("/detokenize", {"model": "tiny", "tokens": tokens}).json()["prompt"]
    return text


def test_a_developers_message_is_shown_to_the_model_as_the_systems(served):
    shown = [prompt_of(served, {"role": role, "content": "Be brief."}) for role in ("system", "developer")]
    assert shown == ["system: Be brief.\nassistant:"] * 2


def test_every_role_of_openais_client_is_served_but_the_one_of_legacy_functions(served):
    for kind in get_args(chat_types.ChatCompletionMessageParam):
        (role,) = get_args(get_type_hints(kind)["role"])
        told = served.post("/v1/chat/completions", asked({"role": role, "content": "x"}))
        assert told.status_code == (400 if role == "function" else 200), told.text


@pytest.mark.parametrize("role", ["admin", "System", "", "function", "ipython"])
@pytest.mark.parametrize("url", ["/v1/chat/completions", "/tokenize"])
def test_a_role_nobody_has_is_refused_by_name_with_those_there_are(served, url, role):
    told = served.post(url, asked({"role": role, "content": "x"}))
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages.0.role")
    assert f"got {role!r}" in error["message"]
    assert all(repr(known) in error["message"] for known in ("system", "developer", "user", "assistant", "tool"))


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed": {}}, "index": 0}
FUNCTION = {"name": "f", "returns": "text", "strict": None}
PASSED_OVER = [
    ("messages.0.annotations", asked({"role": "assistant", "content": "x", "annotations": []})),
    ("messages.0.reasoning_content", asked({"role": "assistant", "content": "x", "reasoning_content": "y"})),
    (
        "messages.0.content.1.cache_control",
        asked({"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "text", "text": "y", "cache_control": {"type": "ephemeral"}}]}),
    ),
    (
        "messages.0.tool_calls.0.function.parsed, messages.0.tool_calls.0.index",
        asked({"role": "assistant", "tool_calls": [CALL]}),
    ),
    ("tools.1.function.returns, tools.1.defer_loading", asked(tool_choice="none", tools=[
        {"type": "function", "function": {"name": "g"}},
        {"type": "function", "function": FUNCTION, "defer_loading": True},
    ])),
    ("stream_options.include_obfuscation", asked(stream_options={"include_obfuscation": False})),
    (
        "response_format.json_schema.description",
        asked(response_format={"type": "json_schema", "json_schema": {
            "name": "n", "description": "what", "strict": False, "schema": {"type": "integer", "x-unknown": 1}}}),
    ),
    ("response_format.more", asked(response_format={"type": "text", "more": 1})),
]  # fmt: skip


@pytest.mark.parametrize(("names", "body"), PASSED_OVER, ids=[names for names, _ in PASSED_OVER])
def test_what_nobody_knows_below_a_field_is_told_by_its_path(served, names, body):
    told = served.post("/v1/chat/completions", {**body, "nobody_knows": 1})
    assert told.status_code == 200, told.text
    assert told.headers["x-farspan-ignored"] == f"nobody_knows, {names}"
    assert "x-farspan-ignored" not in served.post("/v1/chat/completions", asked()).headers


REFUSED = [
    ("messages.0.function_call", asked({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}})),
    ("messages.0.refusal", asked({"role": "assistant", "refusal": "I cannot."})),
    ("messages.0.audio", asked({"role": "assistant", "audio": {"id": "audio_1"}})),
    ("function_call", asked(function_call={"name": "f"})),
    ("functions", asked(functions=[{"name": "f"}])),
    ("response_format.schema", asked(response_format={"type": "json_object", "schema": {"type": "object"}})),
    ("structured_outputs.jsonn", asked(structured_outputs={"jsonn": {}})),
    ("structured_outputs.jsonn", asked(structured_outputs={"regex": "a", "jsonn": {}})),
    ("structured_outputs.wanted", asked(structured_outputs={"wanted": {}})),
    ("structured_outputs", asked(structured_outputs={"json\nb": {}})),
    ("structured_outputs.whitespace_pattern", asked(structured_outputs={"json": {}, "whitespace_pattern": " "})),
    ("structured_outputs.disable_additional_properties", asked(
        structured_outputs={"json": {}, "disable_additional_properties": True})),
    ("structured_outputs.structural_tag", asked(structured_outputs={"structural_tag": "{}"})),
]  # fmt: skip


@pytest.mark.parametrize(("param", "body"), REFUSED)
def test_what_would_change_the_answer_is_refused_by_its_path(served, param, body):
    told = served.post("/v1/chat/completions", body)
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "unsupported_value")
    assert error["message"].startswith(f"{param}: is not served here, got ")
    assert "leave it out" in error["message"]
    assert "\n" not in error["message"]


def test_members_that_ask_for_nothing_are_taken_in_silence(served):
    kinds = [get_type_hints(kind) for kind in get_args(chat_types.ChatCompletionMessageParam)]
    unset = dict.fromkeys({name for kind in kinds for name in kind} - {"role", "content"})
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}
    tool = {"type": "function", "function": {"name": "f", "strict": False, "nobody_knows": None}}
    messages = [{"role": "assistant", "content": "x", **unset}, {"role": "assistant", "content": "x", "refusal": ""}]
    told = served.post(
        "/v1/chat/completions",
        asked(*messages, response_format=form, tools=[tool], tool_choice="none", function_call="none", functions=[]),
    )
    assert told.status_code == 200, told.text
    assert "x-farspan-ignored" not in told.headers
    defaults = {"disable_fallback": False, "disable_any_whitespace": False, "disable_additional_properties": False}
    structured = {"json": {"type": "integer"}, "whitespace_pattern": None, "structural_tag": None, **defaults}
    told = served.post("/v1/chat/completions", asked(structured_outputs=structured))
    assert (told.status_code, "x-farspan-ignored" in told.headers) == (200, False), told.text


def test_a_strict_tool_is_one_whose_calls_fit_its_schema_or_the_header_says_that_none_must():
    def passed_over(**more: Any) -> tuple[str, ...]:
        return read_body(json.dumps(asked(tools=[tool], **more)).encode(), ChatRequest)[1]

    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    named = {"type": "function", "function": {"name": "f"}}
    assert passed_over() == ("tools.0.function.strict",)
    assert [passed_over(tool_choice=choice) for choice in ("none", "required", named)] == [(), (), ()]
    assert passed_over(response_format={"type": "json_object"}) == ()
    # It is about the answer, so no prompt changes.
    assert Tool.model_validate(tool).model_dump(exclude_none=True)["function"] == {
        "name": "f",
        "parameters": {"type": "object"},
    }


def test_of_many_alike_the_first_is_told_and_none_hides_what_is_refused():
    many = [{"role": "assistant", "content": "x", "annotations": [], f"x{number}": 1} for number in range(5_000)]
    _, names = read_body(json.dumps(asked(*many)).encode(), ChatRequest)
    assert len(names) == 100
    assert names[:3] == ("messages.0.annotations", "messages.0.x0", "messages.1.x1")
    assert len(ignored_header(names)["x-farspan-ignored"]) < 1000
    with pytest.raises(ApiError, match=r"^messages\.5000\.function_call: is not served here"):
        read_body(json.dumps(asked(*many, {"role": "assistant", "function_call": {}})).encode(), ChatRequest)
