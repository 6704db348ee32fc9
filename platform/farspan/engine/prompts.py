"""Prompts and answers as lines of JSON: what a line may say, and the file answers are appended to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from farspan.config.load import nearest
from farspan.engine.lowrank import BASE
from farspan.engine.request import SamplingParams
from farspan.errors import CorruptDataError, EngineError, NotFoundError

_SOURCES = ("prompt", "messages", "tokens")
# A line of answers has no place for what these give.
_NOT_OF_A_LINE = ("n", "choice", "request", "logprobs", "prompt_logprobs", "logit_bias", "grammar")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line that can be asked."""

    id: str
    line: int
    tokens: tuple[int, ...]
    params: SamplingParams
    adapter: str = BASE


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
    error: str | None = None

    @property
    def key(self) -> str | int:
        return self.line if self.id is None else self.id

    def to_json(self) -> str:
        where: dict[str, Any] = {"id": self.id, "line": self.line}
        if self.error is not None:
            return json.dumps({**where, "error": self.error})
        shown = {} if self.text is None else {"text": self.text}
        more = {"tokens": list(self.tokens), "finish": self.finish, "prompt_tokens": self.num_prompt}
        return json.dumps({**where, **shown, **more}, ensure_ascii=False)


Line: TypeAlias = Prompt | Answered


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> Iterator[Line]:
    """Every line of a file, as a prompt or as the error it is. `params` are for what a line does not say.

    Raises NotFoundError when there is no such file.
    """
    if not path.is_file():
        raise NotFoundError(str(path), "no such file of prompts")
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                line = parse_line(raw, number, tokenizer, params)
                if isinstance(line, Prompt) and line.id in seen:
                    line = Answered(None, number, error=f"id: must be of one line only, {line.id!r} was given before")
                if line.id is not None:
                    seen.add(line.id)
                yield line


def parse_line(raw: bytes, number: int, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> Line:
    """`{"id": ..., "prompt": text | "tokens": [...] | "messages": [...], "adapter": name, ...}`.

    More keys as in SamplingParams.
    """
    name: str | None = None
    try:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError(f"must be a JSON object, got {type(record).__name__}")
        name = _id(record.pop("id", None), number)
        given = {key: record.pop(key) for key in _SOURCES if key in record}
        if len(given) != 1:
            raise ValueError(f"must have exactly one of {', '.join(_SOURCES)}, got {', '.join(given) or 'none'}")
        ((kind, value),) = given.items()
        adapter = _adapter(record.pop("adapter", BASE))
        return Prompt(name, number, _tokens(kind, value, tokenizer), _params(record, params), adapter)
    except RecursionError:
        return Answered(name, number, error="is nested too deeply")
    except ValueError as problem:
        # Broken JSON and broken UTF-8 too.
        return Answered(name, number, error=" ".join(str(problem).split()))


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


def _tokens(kind: str, value: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    if kind == "tokens":
        if not isinstance(value, list) or any(type(token) is not int for token in value):
            raise ValueError("tokens: must be a list of whole numbers")
        return tuple(value)
    if tokenizer is None:
        raise ValueError(f"{kind}: needs the model's tokenizer; give tokens instead")
    if kind == "prompt":
        if not isinstance(value, str):
            raise ValueError(f"prompt: must be text, got {type(value).__name__}")
        return tuple(tokenizer(value)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError("messages: the tokenizer has no chat template; give prompt instead")
    try:
        text = tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
    except Exception as problem:
        # A template is a program of the model's: what it refuses is this line's mistake.
        raise ValueError(f"messages: the chat template refuses them: {problem}") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _params(record: dict[str, Any], params: SamplingParams) -> SamplingParams:
    changed: dict[str, Any] = {}
    known = {f.name: getattr(params, f.name) for f in fields(SamplingParams) if f.name not in _NOT_OF_A_LINE}
    for key, value in record.items():
        if key in _NOT_OF_A_LINE:
            raise ValueError(f"{key}: cannot be asked for in a file of prompts")
        if key not in known:
            raise ValueError(f"{key}: is not a known key; {nearest(key, [*_SOURCES, 'id', 'adapter', *known])}")
        changed[key] = _fitting(key, value, known[key])
    return replace(params, **changed)


def _fitting(key: str, value: Any, like: Any) -> Any:
    if isinstance(like, frozenset) and isinstance(value, list) and all(type(item) is int for item in value):
        return frozenset(value)
    if isinstance(like, tuple) and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if type(value) is type(like):
        return value
    if isinstance(like, float) and type(value) is int:
        return float(value)
    lists: dict[type, str] = {frozenset: "a list of whole numbers", tuple: "a list of texts"}
    wanted = lists.get(type(like), f"of type {type(like).__name__}")
    raise ValueError(f"{key}: must be {wanted}, got {value!r}")


class AnswerFile:
    """Answers that are there already, and new ones appended; one process at a time writes."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            EngineError: somebody else writes it.
            CorruptDataError: it holds something else than answers. A last line that was torn is dropped.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BufferedWriter = path.open("ab")
        try:
            self._lock(path)
            self.done = self._read(path)
        except BaseException:
            self._file.close()
            raise

    def append(self, answers: Iterable[Answered]) -> None:
        """Written through to the operating system: a process that dies loses nothing of it."""
        for answer in answers:
            self._file.write(answer.to_json().encode() + b"\n")
            self.done.add(answer.key)
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EngineError(f"{path} is being written by another process; wait for it, or choose another") from None

    def _read(self, path: Path) -> set[str | int]:
        done: set[str | int] = set()
        whole = 0
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    done.add(record["line"] if record["id"] is None else record["id"])
                except (ValueError, KeyError, TypeError):
                    raise CorruptDataError(f"{path}:{number}", "is no answer; choose another output") from None
                whole += len(raw)
        self._file.truncate(whole)
        return done
