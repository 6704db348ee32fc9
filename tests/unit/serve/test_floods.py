"""A body of millions of wrong values costs no more than one of them: the first that is wrong is told, no other."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from farspan.serve.body import read_body
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.shape import ApiError, Shape
from farspan.serve.wire import CompletionRequest, DetokenizeRequest

MANY, TOO_MANY = 2_000, 20_000
SHAPES = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = [(shape, name) for shape in SHAPES for name in shape.model_fields]
FLOODS = {
    "texts": [""] * MANY,
    "numbers": [1] * MANY,
    "halves": [0.5] * MANY,
    "objects": [{}] * MANY,
    "lists": [[""]] * MANY,
    "one long list": [[""] * MANY],
    "names": {f"x{number}": "x" for number in range(MANY)},
    "parts": [{"role": "user", "content": [1] * MANY, "tool_calls": [1] * MANY}],
    "messages": [{"role": 1, "content": [1], "name": 1, "tool_calls": [{}], "tool_call_id": 1}] * MANY,
    "tools": [{"type": 1, "function": {"name": 1, "description": 1, "parameters": 1}}] * MANY,
    "form": {"type": 1, "json": [1] * MANY, "regex": 1, "choice": [1] * MANY, "json_schema": [1] * MANY},
    "choices": {"choice": ["a"] * MANY},
}


@pytest.mark.parametrize(("shape", "field"), FIELDS)
@pytest.mark.parametrize("flood", sorted(FLOODS))
def test_no_value_of_a_field_has_more_than_a_few_faults_noted(shape: type[Shape], field: str, flood: str):
    num_faults = 0
    try:
        shape.model_validate({"model": "m", "prompt": "x", field: FLOODS[flood]})
    except ValidationError as problem:
        num_faults = problem.error_count()
    assert num_faults < 30


@pytest.mark.parametrize(
    ("shape", "field", "value", "param"),
    [
        (DetokenizeRequest, "tokens", [""] * TOO_MANY, "tokens.0"),
        (DetokenizeRequest, "tokens", [7] * 2_100_000, "tokens"),
        (ChatRequest, "messages", [1] * TOO_MANY, "messages.0"),
        (ChatRequest, "messages", [{"role": "user", "content": "x"}] * TOO_MANY, "messages"),
        (TokenizeRequest, "messages", [{"role": "user", "content": "x"}] * TOO_MANY, "messages"),
        (CompletionRequest, "prompt", [""] * TOO_MANY, "prompt"),
        (CompletionRequest, "prompt", [[7]] * TOO_MANY, "prompt"),
        (CompletionRequest, "logit_bias", FLOODS["names"], "logit_bias"),
        (CompletionRequest, "guided_choice", ["a"] * TOO_MANY, "guided_choice"),
    ],
)
def test_the_first_fault_of_a_flood_is_told_by_name(shape: type[Shape], field: str, value: object, param: str):
    with pytest.raises(ApiError) as refused:
        read_body(json.dumps({"model": "m", field: value}).encode(), shape)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert len(refused.value.message) < 300


def test_a_long_conversation_and_a_long_text_are_taken():
    messages = [{"role": "user", "content": "x"}] * 10_000
    read, _ = read_body(json.dumps({"model": "m", "messages": messages}).encode(), ChatRequest)
    assert len(read.messages) == 10_000
    read, _ = read_body(json.dumps({"tokens": [7] * 1_048_576}).encode(), DetokenizeRequest)
    assert len(read.tokens) == 1_048_576
