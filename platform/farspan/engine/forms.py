"""The form an answer is held to, by the names that OpenAI and vLLM have for what asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from farspan.engine.request import Grammar

# Read by the engine's thread, before anything of it can be refused.
LONGEST_SOURCE, MOST_TEXTS = 200_000, 1000
# Schemas of tools are the deepest thing anybody sends; more is an attack on whoever walks through it.
DEEPEST = 100
IDLE: dict[str, tuple[bool, ...]] = {
    "disable_additional_properties": (False,),
    # JSON has no white space between its parts here, and no form is left to another way of keeping to it.
    "disable_any_whitespace": (True, False),
    "disable_fallback": (True, False),
}
"""What structured outputs may say beside the form, and changes nothing."""


def form_of(response_format: Any, structured_outputs: Any) -> Grammar | None:
    """The one form that two fields ask for, as JSON has them; none: free text. Raises ValueError for anything else."""
    forms = [] if response_format is None else _formatted(response_format)
    return only_form(forms + ([] if structured_outputs is None else _structured(structured_outputs)))


def only_form(forms: Sequence[Grammar]) -> Grammar | None:
    """Raises ValueError when there are two, or it is too long to be read."""
    if len(forms) > 1:
        raise ValueError(
            f"structured_outputs: the answer can have one form only, got {' and '.join(form.kind for form in forms)}; "
            "leave all but one out of response_format, structured_outputs and guided_*"
        )
    if forms and len(forms[0].source) > LONGEST_SOURCE:
        raise ValueError(
            f"structured_outputs: a {forms[0].kind} may have {LONGEST_SOURCE} characters, got {len(forms[0].source)}"
        )
    return forms[0] if forms else None


def one_of(texts: Sequence[str]) -> Grammar:
    """Raises ValueError where there are none, too many, or empty ones."""
    if not 1 <= len(texts) <= MOST_TEXTS or not all(texts):
        raise ValueError(f"structured_outputs: choice must be 1 to {MOST_TEXTS} texts, none of them empty")
    return Grammar("lark", f"start: {' | '.join(json.dumps(text) for text in texts)}")


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie more than `most` deep, found without recursion."""
    level = [value]
    for _ in range(most):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        if not parts:
            return False
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    return bool(level)


def _formatted(asked: Any) -> list[Grammar]:
    match asked:
        case {"type": "text" | "json_object", **more} if (more.get("schema"), more.get("json_schema")) != (None, None):
            raise ValueError("response_format: only the type json_schema has a schema, which is json_schema.schema")
        case {"type": "text"}:
            return []
        case {"type": "json_object"}:
            return [Grammar("json_object", "")]
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return [_json("response_format", schema)]
    raise ValueError("response_format: must be of type text, json_object or json_schema, which has json_schema.schema")


def _structured(asked: Any) -> list[Grammar]:
    if not isinstance(asked, dict):
        raise ValueError(f"structured_outputs: must be a JSON object, got {type(asked).__name__}")
    return [_named(name, value) for name, value in asked.items() if not _is_idle(name, value)]


def _is_idle(name: str, value: Any) -> bool:
    harmless = (False,) if name == "json_object" else IDLE.get(name, ())
    return value is None or (isinstance(value, bool) and value in harmless)


def _named(name: str, value: Any) -> Grammar:
    match name, value:
        case "json", dict():
            return _json("structured_outputs", value)
        case "json", str():
            return _json("structured_outputs", _loaded(value))
        case "json_object", True:
            return Grammar("json_object", "")
        case "regex", str():
            return Grammar("regex", value)
        case "grammar", str():
            return Grammar("lark", value)
        case "choice", list() if all(isinstance(text, str) for text in value):
            return one_of(value)
    raise ValueError(
        "structured_outputs: must hold json (a schema), json_object (true), regex, choice (some texts) or grammar, "
        f"got {name} with {type(value).__name__}"
    )


def _loaded(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("structured_outputs: json must be a JSON schema, an object or its text")
    return found


def _json(field: str, schema: dict[str, Any]) -> Grammar:
    if is_deeper(schema, DEEPEST):
        raise ValueError(f"{field}: must be a JSON schema, not deeper than {DEEPEST} levels")
    return Grammar("json_schema", json.dumps(schema))
