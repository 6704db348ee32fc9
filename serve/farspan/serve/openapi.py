"""The OpenAPI description of what is accepted: from the very shapes requests are read into."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from farspan.serve.answers import ANSWER_OF, ANSWERS
from farspan.serve.conversation import ChatRequest, TokenizeRequest
from farspan.serve.shape import Shape
from farspan.serve.wire import CompletionRequest, DetokenizeRequest

_POSTS: dict[str, tuple[type[Shape], str, bool]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", True),
    "/v1/completions": (CompletionRequest, "Go on with one or more texts", True),
    "/tokenize": (TokenizeRequest, "The tokens of a text or a conversation", False),
    "/detokenize": (DetokenizeRequest, "The text of tokens", False),
}
_GETS = {
    "/v1/models": ("The model that is served, and its adapters", True),
    "/v1/models/{model_id}": ("A model or an adapter by its name, which may have slashes", True),
    "/v1/requests/{request_id}/trace": ("What a recent request of this key took", True),
    "/health": ("Whether the endpoint itself lives", False),
    "/ready": ("Whether a worker of each kind answers", False),
    "/metrics": ("Numbers for Prometheus", True),
    "/openapi.json": ("This description", False),
}
_ERRORS = {
    "400": "A field breaks a rule: its name, the rule, the value",
    "401": "No valid API key",
    "404": "No such model",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "429": "A limit of the key; Retry-After says when to come again",
    "500": "The request could not be completed",
    "503": "No worker could answer; Retry-After says when to come again",
    "504": "The deadline passed",
}
_DEADLINE = {
    "name": "X-Farspan-Deadline-S",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "Seconds until the answer must be whole",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe() -> dict[str, Any]:
    """OpenAPI 3.1. Fields that are not named are passed over, and told in X-Farspan-Ignored."""
    shapes = [(shape, "validation") for shape, _, _ in _POSTS.values()]
    _, defined = models_json_schema(shapes, by_alias=True, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = {name: _nullable(schema) for name, schema in defined["$defs"].items()}
    paths = {path: {"post": _post(path, *what)} for path, what in _POSTS.items()}
    paths |= {path: {"get": _get(path, *what)} for path, what in _GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "farspan", "version": "1"},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**schemas, **ANSWERS, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """A field of the request itself that has a default may also be null."""
    needed = schema.get("required", [])
    fields = {
        name: field if name in needed or "null" in str(field.get("anyOf")) else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema.get("properties", {}).items()
    }
    return {**schema, "properties": fields}


def _post(path: str, shape: type[Shape], summary: str, generates: bool) -> dict[str, Any]:
    body = {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ANSWER_OF[path]}"}}}
    if generates:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    codes = (
        _ERRORS if generates else {code: _ERRORS[code] for code in ("400", "401", "404", "408", "413", "429", "500")}
    )
    described = {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": {"description": "The answer", "content": content}, **_responses(codes)},
    }
    return {**described, "parameters": [_DEADLINE]} if generates else described


def _get(path: str, summary: str, needs_key: bool) -> dict[str, Any]:
    told = {"description": "It is told", "content": _told(path)}
    described: dict[str, Any] = {"summary": summary, "responses": {"200": told}}
    if "{" in path:
        name = path.partition("{")[2].partition("}")[0]
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        described["responses"] |= _responses({"404": "Not known here, or not to this key"})
    if path == "/ready":
        described["responses"]["503"] = {"description": "Not yet", "content": _told(path)}
    if needs_key:
        described["responses"] |= _responses({"401": _ERRORS["401"]})
        return described
    return {**described, "security": []}


def _told(path: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{ANSWER_OF[path]}"}}}


def _responses(codes: dict[str, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": text, "content": content} for code, text in codes.items()}
