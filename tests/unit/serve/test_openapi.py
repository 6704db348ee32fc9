"""The description says what is accepted: what it allows is taken, what it forbids is refused."""

from __future__ import annotations

import json

import jsonschema
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as text_params
import pytest

from farspan.serve import body as body_module
from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.shape import ApiError
from farspan.serve.wire import CompletionRequest, DetokenizeRequest

SHAPES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}


@pytest.fixture(scope="module")
def described(shared):
    answer = shared.get("/openapi.json", key="none is needed")
    assert answer.status_code == 200
    return answer.json()


def validator(described: dict, path: str) -> jsonschema.Draft202012Validator:
    schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**schema, "components": described["components"]})


def test_every_reference_leads_somewhere_and_every_address_is_described(described, shared):
    for piece in json.dumps(described).split('"$ref": "#/components/schemas/')[1:]:
        assert piece.partition('"')[0] in described["components"]["schemas"]
    addresses = {(route.path, method.lower()) for route in shared.app.routes for method in route.methods - {"HEAD"}}
    assert addresses == {(path, verb) for path, verbs in described["paths"].items() for verb in verbs}
    for name, schema in described["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema), name


GOOD = [
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "prompt": [[1, 2], [3]], "stop": "a", "logit_bias": {"5": -1}, "logprobs": 3}),
    ("/v1/completions", {**TEXT, "n": 3, "best_of": 3, "stop": ["a", "b"], "seed": None, "guided_regex": "a+"}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "unknown": 1, "temperature": 1}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"json": {"type": "object"}}, "max_tokens": None}),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/tokenize", {"prompt": "x"}),
    ("/tokenize", {"messages": CHAT["messages"], "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2]}),
]
BAD = [
    ("/v1/completions", {"model": "m"}),
    ("/v1/completions", {**TEXT, "prompt": {"a": 1}}),
    ("/v1/completions", {**TEXT, "prompt": [1, "a"]}),
    ("/v1/completions", {**TEXT, "temperature": "hot"}),
    ("/v1/completions", {**TEXT, "n": 10**9}),
    ("/v1/completions", {**TEXT, "logprobs": 21}),
    ("/v1/completions", {**TEXT, "stop": ["a"] * 17}),
    ("/v1/completions", {**TEXT, "logit_bias": {"5": "much"}}),
    ("/v1/chat/completions", {**CHAT, "messages": []}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"content": "x"}]}),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "sometimes"}),
    ("/v1/chat/completions", {**CHAT, "stream": "yes"}),
    ("/detokenize", {"tokens": "x"}),
]


@pytest.mark.parametrize(("path", "asked"), GOOD)
def test_what_the_description_allows_is_taken(described, path, asked):
    validator(described, path).validate(asked)
    read_body(json.dumps(asked).encode(), SHAPES[path])


@pytest.mark.parametrize(("path", "asked"), BAD)
def test_what_the_description_forbids_is_refused(described, path, asked):
    assert not validator(described, path).is_valid(asked)
    with pytest.raises(ApiError):
        read_body(json.dumps(asked).encode(), SHAPES[path])


# Fields of OpenAI's own client that say where and how a request is billed, kept or sped up; they change no answer.
HINTS = {
    "metadata", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity",
}  # fmt: skip


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        (chat_params.CompletionCreateParamsBase, ChatRequest),
        (text_params.CompletionCreateParamsBase, CompletionRequest),
    ],
)
def test_every_field_of_openais_client_is_served_refused_by_name_or_a_hint(params, shape):
    known = set(shape.model_fields) | set(body_module._NEUTRAL) | HINTS
    assert {name for name in params.__annotations__ if name not in known} == set()
