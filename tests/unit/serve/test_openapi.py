"""The description says what is accepted: what it allows is taken, what it forbids is refused."""

from __future__ import annotations

import json

import jsonschema
import pytest

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
    paths = [(route.path.replace(":path}", "}"), route.methods - {"HEAD"}) for route in shared.app.routes]
    addresses = {(path, method.lower()) for path, methods in paths for method in methods}
    assert addresses == {(path, verb) for path, verbs in described["paths"].items() for verb in verbs}
    for name, schema in described["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema), name


TOOLS = [{"type": "function", "function": {"name": "f", "strict": True}}]
F = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
GOOD = [
    ("/v1/completions", TEXT),
    ("/v1/completions", {**TEXT, "prompt": [[1, 2], [3]], "stop": "a", "logit_bias": {"5": -1}, "logprobs": 3}),
    ("/v1/completions", {**TEXT, "n": 3, "best_of": 3, "stop": ["a", "b"], "seed": None, "guided_regex": "a+"}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "unknown": 1, "temperature": 1}),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"json": {"type": "object"}}, "max_tokens": None}),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "developer", "content": None, "name": None}]}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": F}}),
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
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "critic", "content": "x"}]}),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}),
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
