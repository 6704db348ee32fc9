"""From the bytes of a request to its checked fields, torch-free.

Fields nobody knows are ignored. Fields that are known and not served are refused unless they ask for nothing: a
client must never get an answer that silently left out what it asked for.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from farspan.serve.wire import ApiError

Body = TypeVar("Body", bound=BaseModel)

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# What each of these fields may say: the value that changes nothing. null is always one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


def read_body(content: bytes | bytearray, shape: type[Body]) -> Body:
    """The request in `content`. Raises ApiError 400, which names the field and the way out."""
    try:
        text = content.decode("utf-8")
        fields = json.loads(text)
        # A lone surrogate is no character: no tokenizer takes it, no answer can repeat it. Only an escape brings one.
        broken = _broken_field(fields) if _ESCAPED_SURROGATE.search(text) else None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    if broken is not None:
        raise ApiError(
            400,
            f"{broken}: must be Unicode text, got half of a surrogate pair; send both halves or neither",
            code="invalid_value",
            param=broken,
        )
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_value", param="body")
    # Clients write null where they mean the default.
    given = {name: value for name, value in fields.items() if value is not None}
    _refuse_unserved(given)
    try:
        return shape.model_validate(given)
    except ValidationError as problem:
        raise _explain_invalid(problem) from None


def _refuse_unserved(fields: dict[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if name in fields and not any(_same(fields[name], value) for value in neutral):
            way_out = "leave it out" + (f" or send {json.dumps(neutral[0])}" if neutral else "")
            raise ApiError(
                400,
                f"{name}: is not served here, got {_shown(fields[name])}; {way_out}",
                code="unsupported_value",
                param=name,
            )


def _same(given: Any, neutral: Any) -> bool:
    # 0 == False in Python, but logprobs=0 asks for something and logprobs=false does not.
    return isinstance(given, bool) == isinstance(neutral, bool) and bool(given == neutral)


def _broken_field(fields: Any) -> str | None:
    """The field of a request that holds a lone surrogate in its name or anywhere below it."""
    if not isinstance(fields, dict):
        return "body" if _is_broken(fields) else None
    return next(
        ("body" if _is_broken(name) else name for name, value in fields.items() if _is_broken([name, value])), None
    )


def _is_broken(value: Any) -> bool:
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_is_broken(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(_is_broken(part) for part in value)


def _explain_invalid(problem: ValidationError) -> ApiError:
    """The first thing that is wrong with a request, in one sentence."""
    first = problem.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
    return ApiError(400, f"{field}: {message}{got}", code="invalid_value", param=field)


def _shown(value: Any) -> str:
    return repr(str(value)[:80])
