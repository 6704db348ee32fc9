"""From the bytes of a request to its checked fields, torch-free.

Fields nobody knows, and hints that change nothing here, are passed over and named in the answer's header. Fields that
would change the answer and are not served are refused unless they ask for nothing: a client must never get an answer
that left out what it asked for.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from farspan.engine.forms import DEEPEST, is_deeper
from farspan.serve.shape import ApiError, Shape

Body = TypeVar("Body", bound=Shape)

IGNORED_HEADER = "x-farspan-ignored"
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_NAMED = 20

# What each of these fields may say where it is not served: the value that changes nothing. null is always one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def read_body(content: bytes | bytearray, shape: type[Body]) -> tuple[Body, tuple[str, ...]]:
    """(the request, names of fields that were passed over). Raises ApiError 400: the field and the way out."""
    fields = _read_json(content)
    # Clients write null where they mean the default.
    given = {name: value for name, value in fields.items() if value is not None}
    known = shape.model_fields
    _refuse_unserved({name: value for name, value in given.items() if name not in known})
    try:
        asked = shape.model_validate(given)
    except ValidationError as problem:
        raise _explain_invalid(problem) from None
    return asked, tuple(name for name in given if name not in known and name not in _NEUTRAL)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that tells a client what was passed over. Names come from outside: only plain ones are repeated."""
    plain = [name for name in names if _PLAIN_NAME.fullmatch(name)]
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
            shown = name if _PLAIN_NAME.fullmatch(name) else "body"
            message = f"{shown}: must not be nested deeper than {DEEPEST} levels"
            raise ApiError(400, message, code="invalid_value", param=shown)
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
    field = ".".join(str(part) for part in first["loc"])[:200]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300]
    if not field:
        # A rule between fields: its sentence begins with one of them.
        return ApiError(400, message, code="invalid_value", param=message.partition(":")[0])
    got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
    return ApiError(400, f"{field}: {message}{got}", code="invalid_value", param=field)


def _shown(value: Any) -> str:
    # A value may have millions of parts: no more of it is written than is told.
    written = value[:80] if isinstance(value, str) else reprlib.repr(value)[:80]
    return repr(written)
