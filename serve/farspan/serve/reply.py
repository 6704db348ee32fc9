"""The objects of one answer, whole or chunk by chunk, in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from farspan.engine.request import TokenLogprobs
from farspan.serve.calls import Said, whole_calls
from farspan.serve.chat import Delta
from farspan.serve.logprobs import chat_logprobs, completion_logprobs
from farspan.serve.text import TokenNames


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt of a choice; `text` and `offsets` of its tokens are told where it is echoed."""

    tokens: tuple[int, ...]
    echoed: bool = False
    text: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """The next piece of one choice, read."""

    delta: Delta
    said: Said
    prompted: Prompted
    first: bool
    finish: str | None
    stop_reason: str | int | None = None
    """What was asked to end the answer, and did: a stop string or token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What an answer tells beside its text."""

    chat: bool
    num_top: int | None = None
    """Likely tokens beside each token; none: no log-probabilities."""
    token_ids: bool = False
    prompt_only: bool = False
    """The one token that the engine answers at least is left out: max_tokens was 0."""


@dataclass(slots=True)
class Counted:
    """Tokens of a whole request. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    style: Style
    answers: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def count(self, delta: Delta) -> None:
        self.answers[delta.index] = 0 if self.style.prompt_only else delta.num_tokens
        self.cached.setdefault(delta.index, delta.num_cached)

    @property
    def answer_tokens(self) -> int:
        return sum(self.answers.values())

    @property
    def cached_tokens(self) -> int:
        """Of the first answer: further ones of a prompt find what that one computed."""
        return self.cached.get(0, 0)

    def report(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.answer_tokens,
            "total_tokens": self.prompt_tokens + self.answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Reply:
    """Builds the objects of one answer."""

    def __init__(self, request_id: str, model: str, style: Style, names: TokenNames) -> None:
        self.id = f"{'chatcmpl' if style.chat else 'cmpl'}-{request_id}"
        self._model, self._style, self._names, self._created = model, style, names, int(time.time())

    def whole(self, choices: Sequence[Sequence[Step]], counted: Counted) -> dict[str, Any]:
        return {
            **self._head(""),
            "choices": [self._choice(steps, streamed=False) for steps in choices],
            "usage": counted.report(),
        }

    def chunk(self, step: Step, counted: Counted | None = None, *, usage_follows: bool = False) -> dict[str, Any]:
        # OpenAI's say null where the last one will say it.
        more: dict[str, Any] = {"usage": None} if usage_follows else {}
        more = more if counted is None else {"usage": counted.report()}
        return {**self._head(".chunk"), "choices": [self._choice([step], streamed=True)], **more}

    def usage_chunk(self, counted: Counted) -> dict[str, Any]:
        return {**self._head(".chunk"), "choices": [], "usage": counted.report()}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._style.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, steps: Sequence[Step], *, streamed: bool) -> dict[str, Any]:
        first, last = steps[0], steps[-1]
        # What the token that is left out would have ended is nobody's.
        cut = self._style.prompt_only and last.finish is not None
        if self._style.chat:
            content: dict[str, Any] = {"delta": _delta(first)} if streamed else {"message": _message(steps)}
        else:
            content = {"text": self._text(steps)}
        return {
            "index": first.delta.index,
            **content,
            "logprobs": self._logprobs(steps),
            "finish_reason": "length" if cut else last.finish,
            # Not OpenAI's, but in every choice of vLLM's.
            "stop_reason": None if cut else last.stop_reason,
            **self._token_ids(steps),
        }

    def _text(self, steps: Sequence[Step]) -> str:
        before = steps[0].prompted.text if steps[0].first else ""
        return before + ("" if self._style.prompt_only else "".join(step.said.text for step in steps))

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        if self._style.num_top is None:
            return None
        deltas = [] if self._style.prompt_only else [step.delta for step in steps]
        found = [one for delta in deltas for one in delta.logprobs]
        if self._style.chat:
            return chat_logprobs(found, self._names, self._style.num_top)
        prompted = steps[0].prompted
        offsets = [len(prompted.text) + offset for delta in deltas for offset in delta.offsets]
        if not (prompted.echoed and steps[0].first):
            return completion_logprobs(found, offsets, self._names, self._style.num_top)
        before: list[TokenLogprobs | int] = [prompted.tokens[0], *(steps[0].delta.prompt_logprobs or ())]
        return completion_logprobs([*before, *found], [*prompted.offsets, *offsets], self._names, self._style.num_top)

    def _token_ids(self, steps: Sequence[Step]) -> dict[str, Any]:
        if not self._style.token_ids:
            return {}
        tokens = [] if self._style.prompt_only else [token for step in steps for token in step.delta.tokens]
        prompt = {"prompt_token_ids": list(steps[0].prompted.tokens)} if steps[0].first else {}
        return {"token_ids": tokens, **prompt}


def _delta(step: Step) -> dict[str, Any]:
    delta: dict[str, Any] = {"role": "assistant"} if step.first else {}
    if step.said.text or (step.first and not step.said.calls):
        delta["content"] = step.said.text
    if step.said.calls:
        delta["tool_calls"] = [call.report() for call in step.said.calls]
    return delta


def _message(steps: Sequence[Step]) -> dict[str, Any]:
    text = "".join(step.said.text for step in steps)
    calls = whole_calls(call for step in steps for call in step.said.calls)
    # OpenAI's always have a refusal, which is never known here.
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    return {**message, "tool_calls": calls} if calls else message


def model_entries(
    names: Sequence[str], created: int, max_context_tokens: int | None, *, chat_template: bool
) -> list[dict[str, Any]]:
    """A model, then its adapters. `chat_template`: whether they answer chat completions; the context: none, where it
    is not known now.
    """
    entry = {"object": "model", "created": created, "owned_by": "farspan"}
    longest = {} if max_context_tokens is None else {"max_model_len": max_context_tokens}
    more = {**longest, "chat_template": chat_template}
    model, *adapters = ({"id": name, **entry, **more} for name in names)
    return [model, *({**adapter, "parent": names[0]} for adapter in adapters)]
