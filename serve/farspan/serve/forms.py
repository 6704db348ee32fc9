"""The form an answer is held to: JSON, a regular expression, one of some texts, a grammar; by every name it has."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from farspan.engine.forms import DEEPEST, LONGEST_SOURCE, MOST_TEXTS, is_deeper, one_of, only_form
from farspan.engine.request import Grammar
from farspan.serve.shape import Items, Shape

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""In a schema of a Lark grammar: no white space between the parts of the JSON, as in answers of one schema."""


def _as_schema(given: dict[str, Any] | str) -> dict[str, Any]:
    """Text is read here, once: whoever takes a schema may count on an object."""
    if isinstance(given, dict):
        return given
    if len(given) > LONGEST_SOURCE:
        raise ValueError(f"must be a JSON schema of at most {LONGEST_SOURCE} characters")
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or is_deeper(found, DEEPEST):
        raise ValueError(f"must be a JSON schema, an object or its text, not deeper than {DEEPEST} levels")
    return found


JsonForm = Annotated[dict[str, Any] | str, AfterValidator(_as_schema)]


class JsonSchema(Shape):
    """`strict` changes nothing: an answer never leaves its schema."""

    name: str | None = None
    strict: bool = True
    # `schema` is a name pydantic uses itself.
    wanted: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Shape):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and with no other")
        return self


class StructuredOutputs(Shape):
    """vLLM's way to ask for a form."""

    # `json` is a name pydantic uses itself.
    wanted: JsonForm | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = Field(default=None, max_length=MOST_TEXTS)
    grammar: str | None = None

    def forms(self) -> list[Grammar]:
        found = [] if self.wanted is None else [Grammar("json_schema", json.dumps(self.wanted))]
        found += [Grammar("json_object", "")] if self.json_object else []
        found += [] if self.regex is None else [Grammar("regex", self.regex)]
        found += [] if self.choice is None else [one_of(self.choice)]
        return found + ([] if self.grammar is None else [Grammar("lark", self.grammar)])


def form_of(response_format: ResponseFormat, *structured: StructuredOutputs | None) -> Grammar | None:
    """The one form that is asked for. Raises ValueError when there are two, or it is too long to be read."""
    forms = [form for asked in structured if asked is not None for form in asked.forms()]
    if response_format.json_schema is not None:
        forms.append(Grammar("json_schema", json.dumps(response_format.json_schema.wanted)))
    elif response_format.type == "json_object":
        forms.append(Grammar("json_object", ""))
    return only_form(forms)
