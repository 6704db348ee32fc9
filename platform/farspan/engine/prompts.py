"""Prompts and answers as lines of JSON: what a line may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from farspan.config.load import nearest
from farspan.engine.forms import form_of
from farspan.engine.lowrank import BASE
from farspan.engine.origin import Origin
from farspan.engine.request import SamplingParams
from farspan.errors import NotFoundError

_SOURCES = ("prompt", "messages", "tokens")
_FORMS = ("response_format", "structured_outputs")
# A line of answers has no place for what these give, or what they say is not the line's to say.
_NOT_OF_A_LINE = ("n", "choice", "request", "logprobs", "prompt_logprobs")
# Said in another way: see _FORMS.
_UNNAMED = ("grammar",)


@dataclass(frozen=True, slots=True)
class Question:
    """One line that makes sense, before its words are tokens."""

    id: str
    line: int
    kind: str
    words: Any
    params: SamplingParams
    adapter: str = BASE
    asked: str = ""
    """Digest of all that its answer depends on."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line that can be asked."""

    id: str
    line: int
    tokens: tuple[int, ...]
    params: SamplingParams
    adapter: str = BASE
    asked: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a line of answers says. `error`: why there is no answer; the other lines are answered all the same."""

    id: str | None
    """None: the line has no id of its own; it is known by its number."""
    line: int
    tokens: tuple[int, ...] = ()
    text: str | None = None
    finish: str | None = None
    num_prompt: int = 0
    asked: str = ""
    error: str | None = None

    def to_json(self) -> str:
        where: dict[str, Any] = {"id": self.id, "line": self.line}
        if self.error is not None:
            return json.dumps({**where, "error": self.error})
        shown = {} if self.text is None else {"text": self.text}
        more = {"tokens": list(self.tokens), "finish": self.finish, "prompt_tokens": self.num_prompt}
        return json.dumps({**where, **shown, **more, "asked": self.asked}, ensure_ascii=False)


Line: TypeAlias = Prompt | Answered


def count_lines(path: Path) -> int:
    """How many lines say anything. Raises NotFoundError when there is no such file."""
    with _opened(path) as file:
        return sum(1 for raw in file if raw.strip())


def read_questions(path: Path, params: SamplingParams, origin: Origin) -> Iterator[Question | Answered]:
    """Every line of a file, as a question to `origin` or as the error it is. `params` are for what a line does not say.

    Raises NotFoundError when there is no such file.
    """
    seen: set[str] = set()
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                line = parse_line(raw, number, params, origin)
                if line.id is not None and line.id in seen:
                    line = Answered(None, number, error=f"id: must be of one line only, {line.id!r} was given before")
                if line.id is not None:
                    seen.add(line.id)
                yield line


def _opened(path: Path) -> BufferedReader:
    if not path.is_file():
        raise NotFoundError(str(path), "no such file of prompts")
    return path.open("rb")


def parse_line(raw: bytes, number: int, params: SamplingParams, origin: Origin) -> Question | Answered:
    """`{"id": ..., "prompt": text | "tokens": [...] | "messages": [...], "adapter": name, ...}`.

    More keys as in SamplingParams; the form of the answer as over HTTP.
    """
    name: str | None = None
    try:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError(f"must be a JSON object, got {type(record).__name__}")
        if b"\\ud" in raw.lower():
            # Half of a surrogate pair is no text. Only an escape brings one.
            json.dumps(record, ensure_ascii=False).encode()
        name = _id(record.pop("id", None), number)
        given = {key: record.pop(key) for key in _SOURCES if key in record}
        if len(given) != 1:
            raise ValueError(f"must have exactly one of {', '.join(_SOURCES)}, got {', '.join(given) or 'none'}")
        ((kind, words),) = given.items()
        adapter = _adapter(record.pop("adapter", BASE))
        wanted = _params(record, number, params)
        return Question(name, number, kind, words, wanted, adapter, origin.digest(adapter, kind, words, wanted))
    except RecursionError:
        return Answered(name, number, error="is nested too deeply")
    except (ValueError, OverflowError) as problem:
        # Broken JSON and broken UTF-8 too.
        return Answered(name, number, error=" ".join(str(problem).split()))


def as_prompt(question: Question, tokenizer: PreTrainedTokenizerBase | None) -> Line:
    """A question as the model reads it, or why it cannot."""
    try:
        tokens = _tokens(question.kind, question.words, tokenizer)
    except ValueError as problem:
        return Answered(question.id, question.line, error=" ".join(str(problem).split()))
    params = _ended(question.params, tokenizer)
    return Prompt(question.id, question.line, tokens, params, question.adapter, question.asked)


def _id(value: object, number: int) -> str:
    if value is None:
        return f"line-{number}"
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"id: must be text or a whole number, got {value!r}")


def _adapter(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"adapter: must be the name of an adapter, got {value!r}")
    return value


def _tokens(kind: str, words: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    if kind == "tokens":
        if not isinstance(words, list) or any(type(token) is not int for token in words):
            raise ValueError("tokens: must be a list of whole numbers")
        return tuple(words)
    if tokenizer is None:
        raise ValueError(f"{kind}: needs the model's tokenizer; give tokens instead")
    if kind == "prompt":
        if not isinstance(words, str):
            raise ValueError(f"prompt: must be text, got {type(words).__name__}")
        return tuple(tokenizer(words)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError("messages: the tokenizer has no chat template; give prompt instead")
    try:
        text = tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)
    except Exception as problem:
        # A template is a program of the model's: what it refuses is this line's mistake.
        raise ValueError(f"messages: the chat template refuses them: {problem}") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ended(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> SamplingParams:
    """As over HTTP, the tokenizer's own end of text ends an answer too, for models whose config does not name it."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    if end is None or params.ignore_eos:
        return params
    return replace(params, stop_token_ids=params.stop_token_ids | {int(end)})


def _params(record: dict[str, Any], number: int, params: SamplingParams) -> SamplingParams:
    """What a line asks for; it draws by its place in the file, or by its own seed alone."""
    # As over HTTP, null is the default.
    record = {key: value for key, value in record.items() if value is not None}
    changed: dict[str, Any] = {"request": 0 if "seed" in record else number}
    forms = [record.pop(key, None) for key in _FORMS]
    if (form := form_of(*forms)) is not None:
        changed["grammar"] = form
    hidden = (*_NOT_OF_A_LINE, *_UNNAMED)
    known = {f.name: getattr(params, f.name) for f in fields(SamplingParams) if f.name not in hidden}
    names = [*_SOURCES, *_FORMS, "id", "adapter", *known]
    for key, value in record.items():
        if key in _NOT_OF_A_LINE:
            raise ValueError(f"{key}: cannot be asked for in a file of prompts")
        if key not in known:
            raise ValueError(f"{key}: is not a known key; {nearest(key, names)}")
        changed[key] = _biases(value) if key == "logit_bias" else _fitting(key, value, known[key])
    return replace(params, **changed)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if isinstance(value, dict) and all(
        token.isdecimal() and type(bias) in (int, float) for token, bias in value.items()
    ):
        return tuple((int(token), float(bias)) for token, bias in value.items())
    raise ValueError(f'logit_bias: must be numbers by tokens, such as {{"17": -100}}, got {value!r}')


def _fitting(key: str, value: Any, like: Any) -> Any:
    if key == "allowed_token_ids" and value == []:
        raise ValueError(f"{key}: must name at least one token, got []; leave it out to allow all")
    if isinstance(like, frozenset) and isinstance(value, list) and all(type(item) is int for item in value):
        return frozenset(value)
    if key == "stop" and isinstance(value, str):
        return (value,)
    if isinstance(like, tuple) and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if type(value) is type(like):
        return value
    if isinstance(like, float) and type(value) is int:
        return float(value)
    lists: dict[type, str] = {frozenset: "a list of whole numbers", tuple: "a list of texts"}
    wanted = lists.get(type(like), f"of type {type(like).__name__}")
    raise ValueError(f"{key}: must be {wanted}, got {value!r}")
