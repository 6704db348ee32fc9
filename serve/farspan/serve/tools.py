"""How a model writes calls of tools, and the grammar that makes it write one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from farspan.engine.request import Grammar
from farspan.serve.calls import Reader
from farspan.serve.conversation import Tool
from farspan.serve.forms import COMPACT
from farspan.serve.json_calls import HERMES_BEGIN, HERMES_END, BareReader, TaggedReader
from farspan.serve.shape import ApiError

CallFormat = Literal["hermes", "llama3"]
FORMATS: tuple[CallFormat, ...] = ("hermes", "llama3")
# A tool that says nothing of its parameters has none.
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
# The name a format has for what a tool is called with.
_ARGUMENTS = {"hermes": "arguments", "llama3": "parameters"}


def call_format(tokenizer: Any, configured: str) -> CallFormat:
    """How this model writes calls. Raises ApiError when its chat template has no place for tools."""
    template = str(tokenizer.get_chat_template(tools=[])) if getattr(tokenizer, "chat_template", None) else ""
    if "tools" not in template:
        message = "tools: this model's chat template has no place for tools; leave them out"
        raise ApiError(400, message, code="unsupported_value", param="tools")
    if configured in FORMATS:
        return next(known for known in FORMATS if known == configured)
    # Llama 3 tells its tools' results as "ipython" and names arguments "parameters".
    bare = HERMES_BEGIN not in template and "ipython" in template and "parameters" in template
    return "llama3" if bare else "hermes"


def reader_of(written: CallFormat, tools: Sequence[Tool], *, several: bool) -> Reader:
    """Reads one answer that may call these tools, more than once where `several` says so."""
    names = frozenset(tool.function.name for tool in tools)
    return TaggedReader(names, several=several) if written == "hermes" else BareReader(names, several=several)


def calls_grammar(
    written: CallFormat, tools: Sequence[Tool], *, several: bool, otherwise: str | None = None
) -> Grammar:
    """Answers that call at least one of the tools, or else are JSON of the schema `otherwise`."""
    rules = ["start: calls" if otherwise is None else "start: calls | form"]
    if otherwise is not None:
        rules.append(f"form: %json {json.dumps({**json.loads(otherwise), **COMPACT})}")
    # Each schema is a root of its own: what it refers to by #/... is found in it.
    if written == "hermes":
        rules.append('calls: call ("\\n" call)*' if several else "calls: call")
        rules.append(f"call: {_text(HERMES_BEGIN)} {_text(chr(10))} any_tool {_text(chr(10))} {_text(HERMES_END)}")
    else:
        rules.append("calls: any_tool")
    rules.append("any_tool: " + " | ".join(f"tool_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        schema = tool.function.parameters or _NOTHING
        head = _text(f'{{"name": {json.dumps(tool.function.name)}, "{_ARGUMENTS[written]}": ')
        rules.append(f"tool_{number}: {head} arguments_{number} {_text('}')}")
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, **COMPACT})}")
    return Grammar("lark", "\n".join(rules))


class TagTokenizer:
    """Decodes as a tokenizer does, but shows the tags of calls where they are special tokens, which are skipped."""

    def __init__(self, tokenizer: Any, tags: frozenset[int], hidden: frozenset[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden - tags

    def decode(self, tokens: Sequence[int], **_: bool) -> str:
        shown = [token for token in tokens if token not in self._hidden]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def showing_tags(tokenizer: Any) -> Any:
    """A tokenizer whose text has the tags of calls in it."""
    hidden = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tags = frozenset(token for token, text in hidden.items() if text in (HERMES_BEGIN, HERMES_END))
    return TagTokenizer(tokenizer, tags, frozenset(hidden)) if tags else tokenizer


def _text(literal: str) -> str:
    return json.dumps(literal)
