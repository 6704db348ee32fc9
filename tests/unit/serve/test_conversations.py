"""What a chat says reaches the model by its own template, whoever speaks and however it is written."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import openai
import pydantic
import pytest
from tests.unit.serve.test_tools import HERMES, LLAMA3

from farspan.models.checkpoint import load_tokenizer
from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.prompt import chat_prompt, cut, unread
from farspan.serve.shape import ApiError
from farspan.serve.tools import call_format

USER = {"role": "user", "content": "Hi"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}: {{ m.content }}\n{% endfor %}"
    "{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}{% if enable_thinking is false %}[quick]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Any:
    made = load_tokenizer(tiny_folder)
    made.chat_template = TEMPLATE
    return made


def asked(*messages: dict[str, Any], **more: Any) -> ChatRequest:
    read, _ = read_body(json.dumps({"model": "m", "messages": messages, **more}).encode(), ChatRequest)
    return read


def rendered(tokenizer: Any, *messages: dict[str, Any], **more: Any) -> str:
    text: str = tokenizer.decode(chat_prompt(tokenizer, asked(*messages, **more), []))
    return text


def test_a_developer_speaks_as_the_system_does(tokenizer, shared):
    by_system, by_developer = ({"role": role, "content": "Be brief."} for role in ("system", "developer"))
    assert rendered(tokenizer, by_developer, USER) == rendered(tokenizer, by_system, USER)
    assert rendered(tokenizer, by_developer) == "system: Be brief.\n"
    told = [shared.post("/tokenize", {"messages": [who, USER]}).json() for who in (by_system, by_developer)]
    assert told[0]["tokens"] == told[1]["tokens"]


@pytest.mark.parametrize("role", ["critic", "function", "User", "", 1, ["user"]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_role_nobody_has_is_refused_by_one_sentence(shared, path, role):
    told = shared.post(path, {"model": "tiny", "messages": [USER, {"role": role, "content": "x"}]})
    error = told.json()["error"]
    assert (told.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "messages.1.role")
    assert "'system', 'developer', 'user', 'assistant' or 'tool'" in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "a b"}, "user: a b\n"),
        ({"role": "user", "name": "Ann", "content": "a"}, "user(Ann): a\n"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}, "user: a b\n"),
        ({"role": "user", "content": []}, "user: \n"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "assistant: No.\n"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "assistant: No.\n"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "assistant<think>b</think>: a\n"),
        ({"role": "assistant", "content": "a", "reasoning": "b"}, "assistant<think>b</think>: a\n"),
        ({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "7"}]}, "tool: 7\n"),
    ],
)
def test_the_words_of_every_kind_of_message_reach_the_template(tokenizer, message, words):
    assert rendered(tokenizer, message) == words


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ({"role": "assistant", "content": "a", "refusal": "b"}, "refusal: must be left out where there is content"),
        ({"role": "assistant", "reasoning": "a", "reasoning_content": "b"}, "must be what reasoning_content is"),
        ({"role": "user", "content": 5}, "must be text, or a list of parts, got '5'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "must be text or refusal"),
        ({"role": "tool", "content": {"a": 1}}, "must be text, or a list of parts"),
    ],
)
def test_words_that_contradict_each_other_or_are_none_are_refused(message, rule):
    with pytest.raises(ApiError, match=rule) as refused:
        asked(USER, message)
    assert str(refused.value.param).startswith("messages.1")


def test_the_effort_of_reasoning_reaches_templates_that_read_it(tokenizer):
    assert rendered(tokenizer, USER, reasoning_effort="low") == "user: Hi\n[low]"
    assert rendered(tokenizer, USER, reasoning_effort="none") == "user: Hi\n[none][quick]"
    words = {"reasoning_effort": "high", "enable_thinking": True}
    assert rendered(tokenizer, USER, reasoning_effort="none", chat_template_kwargs=words) == "user: Hi\n[high]"
    plain = SimpleNamespace(chat_template="x", get_chat_template=lambda tools: "{{ messages }}")
    more = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False, "message": 1}}
    assert unread(tokenizer, asked(USER, **more)) == ("chat_template_kwargs.message",)
    everything = ("chat_template_kwargs.enable_thinking", "chat_template_kwargs.message", "reasoning_effort")
    assert unread(plain, asked(USER, **more)) == everything
    assert unread(plain, asked(USER)) == ()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({}, "123456"), ({"truncate_prompt_tokens": 2}, "56"), ({"truncate_prompt_tokens": 6}, "123456"),
     ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "12"), ({"truncate_prompt_tokens": 9}, "123456"),
     ({"truncate_prompt_tokens": -1}, "3456")],
)  # fmt: skip
def test_no_more_of_a_prompt_is_read_than_asked_for(fields, kept):
    assert cut([1, 2, 3, 4, 5, 6], asked(USER, **fields), 4) == tuple(map(int, kept))


def test_a_truncated_prompt_is_what_is_computed_counted_and_echoed(shared, oracle):
    whole = oracle[1]("def answer(self):")["input_ids"]
    body = {"model": "tiny", "prompt": "def answer(self):", "max_tokens": 1, "echo": True, "return_token_ids": True}
    told = shared.post("/v1/completions", {**body, "truncate_prompt_tokens": 3}).json()
    assert told["usage"]["prompt_tokens"] == 3
    assert told["choices"][0]["prompt_token_ids"] == whole[-3:]
    assert told["choices"][0]["text"].startswith(oracle[1].decode(whole[-3:]))
    chat = {"model": "tiny", "messages": [USER], "max_tokens": 1, "return_token_ids": True}
    full = shared.post("/v1/chat/completions", chat).json()["choices"][0]["prompt_token_ids"]
    less = shared.post("/v1/chat/completions", {**chat, "truncate_prompt_tokens": 4}).json()["choices"][0]
    assert less["prompt_token_ids"] == full[-4:]


def test_a_prompt_that_is_cut_to_what_the_model_takes_leaves_room_for_the_answer(shared):
    body = {"model": "tiny", "prompt": [5, 6] * 4200, "truncate_prompt_tokens": -1, "ignore_eos": True}
    for max_tokens, kept in ((3, 8189), (9000, 8191)):
        answer = shared.post("/v1/completions", {**body, "max_tokens": max_tokens}).json()
        assert answer["usage"]["prompt_tokens"] == kept
        assert answer["usage"]["completion_tokens"] == min(max_tokens, 1 if max_tokens > 8192 else 3)
    refused = shared.post("/v1/completions", {**body, "truncate_prompt_tokens": 0}).json()["error"]
    assert refused["param"] == "truncate_prompt_tokens"
    assert "must be at least 1, or -1" in refused["message"]


MISTRAL = "{% for t in tools %}[AVAILABLE_TOOLS]{{ t }}{% endfor %}[TOOL_CALLS]"
QWEN_CODER = HERMES + "<tool_call>\n<function=example>\n<parameter=a>"
GLM = HERMES + "<tool_call>{name}\n<arg_key>"


@pytest.mark.parametrize(
    ("template", "written"),
    [(HERMES, "hermes"), (LLAMA3, "llama3"), (MISTRAL, None), (QWEN_CODER, None), (GLM, None), (TEMPLATE, None)],
)
def test_how_a_model_writes_calls_is_told_by_the_marks_of_its_template_or_by_the_config(template, written):
    tokenizer = SimpleNamespace(chat_template=template, get_chat_template=lambda tools: template)
    if written is not None:
        assert call_format(tokenizer, "auto") == written
        return
    with pytest.raises(ApiError) as refused:
        call_format(tokenizer, "auto")
    error = refused.value
    assert (error.status, error.param) == (400, "tools")
    if "tools" not in template:
        assert "no place for tools" in error.message
        return
    assert "tool_format in the endpoint's config to one of hermes, llama3" in error.message
    assert [call_format(tokenizer, each) for each in ("hermes", "llama3")] == ["hermes", "llama3"]


def test_tools_that_a_template_has_no_place_for_are_not_left_out_of_what_tokenize_counts(shared):
    tools = [{"type": "function", "function": {"name": "f"}}]
    told = shared.post("/tokenize", {"messages": [USER], "tools": tools})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "tools")


def test_either_bound_of_the_answer_holds():
    for fields, most in (
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 5),
        ({"max_tokens": 9, "max_completion_tokens": 6}, 6),
    ):
        assert asked(USER, **fields).answer_tokens == most


def test_usage_is_null_in_every_chunk_but_the_last_where_it_is_asked_for(shared):
    async def chunks(client: openai.AsyncOpenAI, **more: Any) -> list[Any]:
        body = {"model": "tiny", "messages": [USER], "max_tokens": 3, "stream": True, "n": 2}
        return [chunk async for chunk in await client.chat.completions.create(**body, **more)]

    told = shared.ask(lambda client: chunks(client, stream_options={"include_usage": True}))
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in told[:-1])
    assert (told[-1].choices, told[-1].usage.completion_tokens) == ([], 6)
    assert {choice.index for chunk in told for choice in chunk.choices} == {0, 1}
    assert all("usage" not in chunk.model_fields_set for chunk in shared.ask(chunks))
    assert read_body(b'{"prompt": "x"}', TokenizeRequest)[1] == ()


class Weather(pydantic.BaseModel):
    sunny: bool
    days: int


def test_the_clients_own_parser_finds_what_it_asked_for(shared):
    async def parse(client: openai.AsyncOpenAI) -> Any:
        body = {"model": "tiny", "messages": [USER], "max_tokens": 60, "temperature": 0}
        return await client.chat.completions.parse(**body, response_format=Weather)

    assert isinstance(shared.ask(parse).choices[0].message.parsed, Weather)
