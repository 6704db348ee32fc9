"""How a model writes calls of tools, and the grammar that makes it write one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from farspan.engine.request import Grammar
from farspan.errors import RequestError
from farspan.serve.calls import Reader
from farspan.serve.conversation import Tool
from farspan.serve.forms import COMPACT
from farspan.serve.json_calls import HERMES_BEGIN, HERMES_END, BareReader, TaggedReader
from farspan.serve.prompt import template_with_tools
from farspan.serve.shape import ApiError
from farspan.serve.wire import GenerationFields

CallFormat = Literal["hermes", "llama3"]
FORMATS: tuple[CallFormat, ...] = ("hermes", "llama3")
# A tool that says nothing of its parameters has none.
_NOTHING = {"properties": {}, "additionalProperties": False}
# Also of a schema that allows anything else.
_OBJECT = {"type": "object"}
# The name a format has for what a tool is called with.
_ARGUMENTS = {"hermes": "arguments", "llama3": "parameters"}
# A grammar's line, and what llguidance finds there.
_IMPOSSIBLE = re.compile(
    r"grammar: lark is impossible: at (\d+)\(\d+\): failed to compile JSON schema: (.*?)(?: \d+ \| |$)"
)
_NAMED = re.compile(r'"\{\\"name\\": \\"([A-Za-z0-9_.-]+)\\"')
_TAGS = frozenset({HERMES_BEGIN, HERMES_END})
# Models that write no JSON between Hermes' tags, as Qwen3-Coder and GLM, show these there.
_NOT_HERMES = ("<function=", "<arg_key>")
NO_TOKENS: Mapping[str, int] = {}


def call_format(tokenizer: Any, configured: str) -> CallFormat:
    """How this model writes calls. Raises ApiError where its chat template has no place for tools, or hides it."""
    template = template_with_tools(tokenizer)
    if configured in FORMATS:
        return next(known for known in FORMATS if known == configured)
    if HERMES_BEGIN in template and not any(other in template for other in _NOT_HERMES):
        return "hermes"
    # Llama 3 tells its tools' results as "ipython" and names arguments "parameters".
    if HERMES_BEGIN not in template and "ipython" in template and "parameters" in template:
        return "llama3"
    message = (
        "tools: this model's chat template does not show how it writes calls; leave them out, or set tool_format in "
        f"the endpoint's config to one of {', '.join(FORMATS)}"
    )
    raise ApiError(400, message, code="unsupported_value", param="tools")


def reader_of(written: CallFormat, tools: Sequence[Tool], *, several: bool) -> Reader:
    """Reads one answer that may call these tools, more than once where `several` says so."""
    names = frozenset(tool.function.name for tool in tools)
    return TaggedReader(names, several=several) if written == "hermes" else BareReader(names, several=several)


def calls_grammar(
    written: CallFormat,
    tools: Sequence[Tool],
    special: Mapping[str, int] = NO_TOKENS,
    *,
    several: bool,
    otherwise: str | None = None,
) -> Grammar:
    """Answers that call at least one of the tools, or else are JSON of the schema `otherwise`."""
    rules = ["start: calls" if otherwise is None else "start: calls | form"]
    if otherwise is not None:
        rules.append(f"form: %json {json.dumps({**json.loads(otherwise), **COMPACT})}")
    if written == "hermes":
        rules.append('calls: call ("\\n" call)*' if several else "calls: call")
        rules.append(f"call: {_tag(HERMES_BEGIN, special)} {_body(special)}")
    else:
        rules.append("calls: any_tool")
    return Grammar("lark", "\n".join([*rules, *_tool_rules(written, tools)]))


def words_or_calls_grammar(
    written: CallFormat, tools: Sequence[Tool], special: Mapping[str, int] = NO_TOKENS
) -> Grammar:
    """Any answer whose calls are of these tools, and of the schemas of those that are strict."""
    loose = frozenset(tool.function.name for tool in tools if not tool.function.strict)
    others = [str(special[text]) for text in sorted(special) if text not in _TAGS]
    rules = _hermes_words(special, between=bool(others)) if written == "hermes" else _bare_words(between=bool(others))
    # Text has no special tokens, and a model may think between some.
    rules += [f"token: <[{','.join(others)}]>"] if others else []
    return Grammar("lark", "\n".join([*rules, *_tool_rules(written, tools, loose)]))


def told_by_tool(problem: RequestError, grammar: Grammar | None) -> RequestError | ApiError:
    """The tool whose parameters no call can be held to, where that is what is wrong with a grammar of these."""
    found, rules = _IMPOSSIBLE.match(problem.reason), [] if grammar is None else grammar.source.splitlines()
    # What a call begins with stands before its arguments.
    head = _NAMED.search(rules[int(found[1]) - 2]) if found and 2 <= int(found[1]) <= len(rules) else None
    if found is None or head is None:
        return problem
    message = (
        f"tools: no call of {head[1]} can be held to its parameters ({found[2]}); change them, or let the model decide "
        "(tool_choice=auto) on calls of a tool that is not strict"
    )
    return ApiError(400, message, code="invalid_value", param="tools")


class TagTokenizer:
    """Decodes as a tokenizer does, but shows some of the special tokens, which are skipped otherwise."""

    def __init__(self, tokenizer: Any, shown: frozenset[int], hidden: frozenset[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden - shown

    def decode(self, tokens: Sequence[int], **_: bool) -> str:
        shown = [token for token in tokens if token not in self._hidden]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def telling_of(tokenizer: Any, asked: GenerationFields, *, tags: bool = False) -> Any:
    """The tokenizer whose text is told: with tags of calls in it, or with all special tokens; but those that end it
    only where what ends it is shown.
    """
    if asked.skip_special_tokens:
        return showing_tags(tokenizer) if tags else tokenizer
    special = frozenset(_special(tokenizer))
    if asked.include_stop_str_in_output:
        return TagTokenizer(tokenizer, special, special)
    ends = () if asked.ignore_eos or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return TagTokenizer(tokenizer, special - {*asked.stop_token_ids, *ends}, special)


def showing_tags(tokenizer: Any) -> Any:
    """A tokenizer whose text has the tags of calls in it."""
    special = _special(tokenizer)
    tags = frozenset(token for token, text in special.items() if text in _TAGS)
    return TagTokenizer(tokenizer, tags, frozenset(special)) if tags else tokenizer


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens that an answer may have inside, which no text is."""
    return {text: token for token, text in _special(tokenizer).items() if token != tokenizer.eos_token_id}


def _special(tokenizer: Any) -> dict[int, str]:
    return {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _hermes_words(special: Mapping[str, int], *, between: bool) -> list[str]:
    tagged = f" | WORDS <[{special[HERMES_BEGIN]}]>" if HERMES_BEGIN in special else ""
    return [
        "start: (call | WORDS token)* WORDS" if between else "start: call* WORDS",
        f"call: begin {_body(special)}",
        f"begin: spelled{tagged}",
        # The first tag ends the words.
        f"spelled[lazy]: WORDS {_text(HERMES_BEGIN)}",
        "WORDS: /(.|\\n)*/",
    ]


def _bare_words(*, between: bool) -> list[str]:
    # What begins with a brace is a call.
    first, rest = ("token* ", " (token REST)*") if between else ("", "")
    return [
        f"start: {first}calls | {first}BLANK | {first}WORDS{rest}",
        'calls: any_tool ("; " any_tool)*',
        "BLANK: /\\s*/",
        "WORDS: /\\s*[^{\\s](.|\\n)*/",
        *(["REST: /(.|\\n)*/"] if between else []),
    ]


def _body(special: Mapping[str, int]) -> str:
    """What follows the first tag of a call."""
    return f"{_text(chr(10))} any_tool {_text(chr(10))} {_tag(HERMES_END, special)}"


def _tool_rules(written: CallFormat, tools: Sequence[Tool], loose: frozenset[str] = frozenset()) -> list[str]:
    """A call of any of the tools. Of those that are `loose` the arguments are any JSON."""
    rules = ["any_tool: " + " | ".join(f"tool_{number}" for number in range(len(tools)))]
    # Each schema is a root of its own: what it refers to by #/... is found in it.
    for number, tool in enumerate(tools):
        function = tool.function
        wanted = _NOTHING if function.parameters is None else function.parameters
        schema = _OBJECT if function.name in loose else {**wanted, **_OBJECT, **COMPACT}
        head = _text(f'{{"name": {json.dumps(function.name)}, "{_ARGUMENTS[written]}": ')
        rules.append(f"tool_{number}: {head} arguments_{number} {_text('}')}")
        rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
    return rules


def _tag(tag: str, special: Mapping[str, int]) -> str:
    """A tag as text, or as the token that it is."""
    return f"({_text(tag)} | <[{special[tag]}]>)" if tag in special else _text(tag)


def _text(literal: str) -> str:
    return json.dumps(literal)
