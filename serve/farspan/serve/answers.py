"""What answers look like, for whoever reads the description: JSON schemas of what reply.py and trace.py build."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": ["number", "null"], "minimum": 0}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer"}}
_LOGPROBS: Schema = {"type": ["object", "null"]}
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_STOP: Schema = {"type": ["string", "integer", "null"]}


def _object(*, optional: Schema | None = None, **fields: Schema) -> Schema:
    """All `fields` are there, `optional` ones may be."""
    return {"type": "object", "required": list(fields), "properties": {**fields, **(optional or {})}}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _name(schema: str) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"}


_CALL = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
_MESSAGE = _object(
    role={"const": "assistant"},
    content={"type": ["string", "null"]},
    refusal={"type": "null"},
    optional={"tool_calls": _list(_CALL)},
)
_CHOICE: Schema = {"index": _COUNT, "logprobs": _LOGPROBS, "finish_reason": _FINISH, "stop_reason": _STOP}
_IDS: Schema = {"token_ids": _TOKENS, "prompt_token_ids": _TOKENS}
_HEAD: Schema = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _name("Usage")}
_LATENCY = _object(p50=_SECONDS, p90=_SECONDS, p99=_SECONDS)

ANSWERS: dict[str, Schema] = {
    "ChatCompletion": _object(
        **_HEAD,
        object={"const": "chat.completion"},
        choices=_list(_object(**_CHOICE, message=_MESSAGE, optional=_IDS)),
    ),
    "Completion": _object(
        **_HEAD, object={"const": "text_completion"}, choices=_list(_object(**_CHOICE, text=_TEXT, optional=_IDS))
    ),
    "Description": _object(openapi=_TEXT, info={"type": "object"}, paths={"type": "object"}),
    "Health": _object(status={"const": "ok"}),
    "Model": _object(
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        chat_template={"type": "boolean"},
        optional={"parent": _TEXT, "max_model_len": _COUNT},
    ),
    "Models": _object(object={"const": "list"}, data=_list(_name("Model"))),
    "Readiness": _object(status=_TEXT, optional={"roles": _list(_TEXT), "reason": _TEXT}),
    "Text": _object(prompt=_TEXT),
    "Tokens": _object(count=_COUNT, tokens=_TOKENS, optional={"max_model_len": _COUNT, "token_strs": _list(_TEXT)}),
    "Trace": _object(
        request_id=_TEXT,
        prompt_tokens=_COUNT,
        cached_tokens=_COUNT,
        route=_TEXT,
        route_reason=_TEXT,
        queue_s=_SECONDS,
        kv_bytes=_COUNT,
        kv_digest=_TEXT,
        recoveries=_list(_TEXT),
        output_tokens=_COUNT,
        time_to_first_token_s=_SECONDS,
        total_s=_SECONDS,
        inter_token_latency_s=_LATENCY,
        optional={"other_choices": _list(_name("Trace"))},
    ),
    "Usage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    ),
}
ANSWER_OF = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/v1/models": "Models",
    "/v1/models/{model_id}": "Model",
    "/v1/requests/{request_id}/trace": "Trace",
    "/health": "Health",
    "/ready": "Readiness",
    "/openapi.json": "Description",
}
