"""Whatever a client knows to ask for is served, refused by its place, or passed over and named: nothing is dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as text_params
import pytest

from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.shape import ApiError, Shape
from farspan.serve.unserved import NEUTRAL
from farspan.serve.wire import CompletionRequest

USER = {"role": "user", "content": "x"}
CHAT = {"model": "m", "messages": [USER]}
TEXT = {"model": "m", "prompt": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD: dict[type[Shape], dict[str, Any]] = {ChatRequest: CHAT, CompletionRequest: TEXT, TokenizeRequest: {"prompt": "x"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}

# They say where and how a request is billed, kept, sped up or displayed, and change no answer.
HINTS = {
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user", "verbosity",
    "messages.content.prompt_cache_breakpoint", "response_format.json_schema.description",
    "stream_options.include_obfuscation",
}  # fmt: skip
# They stand beside a `type` that is refused.
OF_REFUSED_TYPES = {
    "messages.content.file", "messages.content.image_url", "messages.content.input_audio",
    "messages.tool_calls.custom", "tool_choice.custom", "tools.custom",
}  # fmt: skip
# Of the requests of vLLM 0.32, what OpenAI's have not.
VLLM = {
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "chat_template",
    "chat_template_kwargs", "continue_final_message", "documents", "ec_transfer_params", "echo", "ignore_eos",
    "include_reasoning", "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logprob_token_ids",
    "media_io_kwargs", "min_p", "min_tokens", "mm_payload", "mm_processor_kwargs", "priority", "prompt_embeds",
    "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id", "return_mm_kwargs",
    "return_prompt_text", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids",
    "routed_experts_prompt_start", "session_id", "skip_special_tokens", "spaces_between_special_tokens",
    "stop_token_ids", "stream_interval", "structured_outputs", "thinking_token_budget", "top_k",
    "truncate_prompt_tokens", "truncation_side", "use_beam_search", "vllm_xargs", "watermarking",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
    "guided_whitespace_pattern", "stream_options.continuous_usage_stats", "messages.reasoning", "messages.tools",
    "messages.reasoning_content", "structured_outputs.json", "structured_outputs.regex", "structured_outputs.choice",
    "structured_outputs.grammar", "structured_outputs.json_object", "structured_outputs.disable_any_whitespace",
    "structured_outputs.disable_additional_properties", "structured_outputs.whitespace_pattern",
    "structured_outputs.structural_tag", "structured_outputs.disable_fallback",
}  # fmt: skip
# No media is served, chunks are as they come, ids are told by headers, a template's words are for chats.
VLLM_HINTS = {
    "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "return_mm_kwargs", "stream_interval", "request_id",
    "session_id", "guided_decoding_backend", "add_generation_prompt", "chat_template_kwargs", "continue_final_message",
    "messages.reasoning", "messages.reasoning_content",
}  # fmt: skip


def members(kind: Any, above: str = "") -> Iterator[str]:
    """Paths of all that a type of the client's may hold."""
    # Its TypedDicts are those of typing_extensions.
    if not hasattr(kind, "__required_keys__"):
        for inner in get_args(kind):
            yield from members(inner, above)
        return
    for name, hint in get_type_hints(kind).items():
        yield f"{above}{name}"
        yield from members(hint, f"{above}{name}.")


def served(shape: type[Shape], path: str) -> bool:
    """Whether a field of that path is read."""
    name, _, below = path.partition(".")
    field = next((field for known, field in shape.model_fields.items() if name == (field.alias or known)), None)
    return field is not None and (not below or any(served(inner, below) for inner in shapes_of(field.annotation)))


def shapes_of(kind: Any) -> Iterator[type[Shape]]:
    if isinstance(kind, type) and issubclass(kind, Shape):
        yield kind
    for inner in get_args(kind):
        yield from shapes_of(inner)


def under(path: str, paths: set[str]) -> bool:
    return any(path == known or path.startswith(f"{known}.") for known in paths)


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        (chat_params.CompletionCreateParamsBase, ChatRequest),
        (text_params.CompletionCreateParamsBase, CompletionRequest),
    ],
)
def test_every_field_of_openais_client_is_served_refused_by_its_place_or_a_hint(params, shape):
    paths = set(members(params))
    assert len(paths) > (100 if shape is ChatRequest else 15)
    told = {*NEUTRAL, *HINTS, *OF_REFUSED_TYPES}
    assert {path for path in paths if not served(shape, path) and not under(path, told)} == set()


@pytest.mark.parametrize("shape", [ChatRequest, CompletionRequest])
def test_every_field_of_vllms_requests_is_served_refused_by_its_place_or_a_hint(shape):
    told = {*NEUTRAL, *VLLM_HINTS}
    assert {path for path in VLLM if not served(shape, path) and not under(path, told)} == set()


def holding(path: str, value: Any) -> tuple[bytes, type[Shape]]:
    """A request that has that value where a path leads to, and is otherwise plain."""
    above, _, name = path.rpartition(".")
    shape = ChatRequest if above else next(shape for shape in GOOD if not served(shape, path))
    good, more = GOOD[shape], {name: value}
    match above:
        case "":
            body = {**good, **more}
        case "messages":
            body = {**good, "messages": [{**USER, **more}]}
        case "response_format":
            body = {**good, "response_format": {"type": "text", **more}}
        case _:
            body = {**good, above: more}
    return json.dumps(body).encode(), shape


@pytest.mark.parametrize("path", sorted(NEUTRAL))
def test_a_field_that_is_not_served_is_refused_by_its_place_unless_it_asks_for_nothing(path):
    place = path.replace("messages.", "messages.0.")
    with pytest.raises(ApiError) as refused:
        read_body(*holding(path, {"anything": 7}))
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "unsupported_value", place)
    assert error.message.startswith(f"{place}: is not served here, got \"{{'anything': 7}}\"; leave it out")
    plain, nothing = read_body(*holding(path, None))
    assert nothing == ()
    for harmless in NEUTRAL[path]:
        assert read_body(*holding(path, harmless)) == (plain, ())


PASSED_OVER = [
    ({"user": "me", "metadata": {"a": "b"}}, "user metadata"),
    ({"messages": [{**USER, "cache_control": {"type": "ephemeral"}}]}, "messages.0.cache_control"),
    ({"messages": [USER, {**USER, "id": "1"}, {**USER, "id": "2"}]}, "messages.1.id"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 1}]}]},
     "messages.0.content.0.cache_control"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}]}, "messages.0.tool_calls.0.index"),
    ({"tools": [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "g", "eager": True}}]},
     "tools.1.function.eager"),
    ({"tools": [{**TOOL, "cache_control": {}}]}, "tools.0.cache_control"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f", "x": 1}}},
     "tool_choice.function.x"),
    ({"response_format": {**SCHEMA, "json_schema": {**SCHEMA["json_schema"], "description": "It."}}},
     "response_format.json_schema.description"),
    ({"stream": True, "stream_options": {"include_obfuscation": False}}, "stream_options.include_obfuscation"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "places"), PASSED_OVER)
def test_what_changes_nothing_is_passed_over_and_told_by_its_first_place(fields, places):
    _, ignored = read_body(json.dumps({**CHAT, **fields}).encode(), ChatRequest)
    assert " ".join(ignored) == places


REFUSED = [
    ({"structured_outputs": {"regex": "a", "backend": "xgrammar"}}, "structured_outputs.backend"),
    ({"structured_outputs": {"wanted": {"type": "object"}}}, "structured_outputs.wanted"),
    ({"structured_outputs": {"regex": "a", "a\nb": 1}}, "structured_outputs"),
    ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, "response_format.schema"),
    ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
     "messages.1.function_call"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
     "messages.0.tool_calls.0.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "place"), REFUSED)
def test_what_would_change_the_answer_is_refused_wherever_it_stands(fields, place):
    with pytest.raises(ApiError) as refused:
        read_body(json.dumps({**CHAT, **fields}).encode(), ChatRequest)
    assert (refused.value.status, refused.value.param) == (400, place)
    assert "\n" not in refused.value.message


def test_null_is_the_default_wherever_it_stands():
    """What the official client's own objects look like when they are sent back."""
    said = {"role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, "name": None}  # fmt: skip
    asked = {
        **CHAT,
        "messages": [USER, {**said, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "1"}],
        "tools": [{"type": "function", "function": {**TOOL["function"], "strict": None, "description": None}}],
        "response_format": {**SCHEMA, "json_schema": {**SCHEMA["json_schema"], "strict": None}},
        "stream_options": {"include_usage": None, "continuous_usage_stats": None},
        "structured_outputs": {"json": None, "regex": None, "whitespace_pattern": None, "unknown": None},
    }
    read, ignored = read_body(json.dumps(asked).encode(), ChatRequest)
    assert ignored == ()
    assert (read.include_usage, read.form().kind, read.tools[0].function.strict) == (False, "json_schema", False)


def test_the_header_names_places(shared):
    asked = {
        **CHAT,
        "model": "tiny",
        "messages": [{**USER, "cache_control": {}}],
        "max_tokens": 1,
        "user": "me",
        "chat_template_kwargs": {"enable_thinking": False, "m": 1},
        "reasoning_effort": "low",
    }
    told = shared.post("/v1/chat/completions", asked)
    assert told.status_code == 200
    # The template has an `m`.
    assert told.headers["x-farspan-ignored"] == (
        "messages.0.cache_control, user, chat_template_kwargs.enable_thinking, reasoning_effort"
    )
