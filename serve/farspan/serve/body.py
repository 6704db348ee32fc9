"""From the bytes of a request to its checked fields, torch-free.

Fields nobody knows, and hints that change nothing here, are passed over and named in the answer's header, wherever they
stand. Fields that would change the answer and are not served (unserved.py) are refused unless they ask for nothing: a
client must never get an answer that left out what it asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from farspan.engine.forms import DEEPEST, is_deeper
from farspan.serve.shape import ApiError, Shape
from farspan.serve.unserved import PLAIN_NAME, passed_over, shown

Body = TypeVar("Body", bound=Shape)

IGNORED_HEADER = "x-farspan-ignored"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_NAMED = 20


def read_body(content: bytes | bytearray, shape: type[Body]) -> tuple[Body, tuple[str, ...]]:
    """(the request, places of fields that were passed over). Raises ApiError 400: the field and the way out."""
    fields = _read_json(content)
    try:
        asked = shape.model_validate(fields)
    except ValidationError as problem:
        raise _explain_invalid(problem) from None
    return asked, passed_over(asked, fields)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that tells a client what was passed over. Names come from outside: only plain ones are repeated."""
    plain = [name for name in names if PLAIN_NAME.fullmatch(name)]
    return {IGNORED_HEADER: ", ".join(plain[:_MOST_NAMED])} if plain else {}


def _read_json(content: bytes | bytearray) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_value", param="body")
    for name, value in fields.items():
        if is_deeper(value, DEEPEST):
            param = name if PLAIN_NAME.fullmatch(name) else "body"
            message = f"{param}: must not be nested deeper than {DEEPEST} levels"
            raise ApiError(400, message, code="invalid_value", param=param)
    # A lone surrogate is no character: no tokenizer takes it, no answer can repeat it. Only an escape brings one.
    broken = _broken_field(fields) if _ESCAPED_SURROGATE.search(text) else None
    if broken is not None:
        raise ApiError(
            400,
            f"{broken}: must be Unicode text, got half of a surrogate pair; send both halves or neither",
            code="invalid_value",
            param=broken,
        )
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _broken_field(fields: dict[str, Any]) -> str | None:
    """The field of a request that holds a lone surrogate in its name or anywhere below it."""
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
    # Few are noted: every list is refused at its first wrong item.
    first = problem.errors(include_url=False, include_context=False)[0]
    # The name of a member is marked as such.
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")[:200]
    # pydantic's own sentence names our class.
    told = "must be an object" if first["type"] == "model_type" else first["msg"]
    message = " ".join(told.removeprefix("Value error, ").split())[:300]
    if not field:
        # A rule between fields: its sentence begins with one of them.
        return ApiError(400, message, code="invalid_value", param=message.partition(":")[0])
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    return ApiError(400, f"{field}: {message}{got}", code="invalid_value", param=field)
