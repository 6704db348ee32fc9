"""The OpenAI-compatible requests and answers, torch-free. What is known and not served is refused in body.py."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from farspan.engine.request import Grammar

# Every token of every answer is compared with these.
_MOST_STOPS, _LONGEST_STOP, _MOST_STOP_TOKENS, _MOST_BIASES = 16, 1000, 1000, 1000

StopString = Annotated[str, Field(max_length=_LONGEST_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Request):
    include_usage: bool = False


class JsonSchema(_Request):
    # `schema` is a name pydantic uses itself.
    wanted: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Request):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and with no other")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the engine holds the answer to."""
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.wanted))
        return Grammar("json_object", "") if self.type == "json_object" else None


class GenerationFields(_Request):
    """What completions and chat completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[int, Bias] = Field(default_factory=dict, max_length=_MOST_BIASES)
    min_tokens: int = Field(default=0, ge=0)
    response_format: ResponseFormat = Field(default_factory=lambda: ResponseFormat(type="text"))
    seed: int | None = None
    stop: list[StopString] = Field(default_factory=list, max_length=_MOST_STOPS)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=_MOST_STOP_TOKENS)
    ignore_eos: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationFields):
    prompt: str | list[int] | list[str]
    max_tokens: int = Field(default=16, ge=1)

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value: str | list[int] | list[str]) -> str | list[int] | list[str]:
        if isinstance(value, list) and value and isinstance(value[0], str) and len(value) > 1:
            raise ValueError("only one prompt in a request is served")
        return value


class ChatMessage(_Request):
    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The words of the message."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content)
        return self.content or ""


class ChatRequest(GenerationFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @field_validator("messages")
    @classmethod
    def _text_only(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        for message in value:
            parts = message.content if isinstance(message.content, list) else []
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
                raise ValueError("only text content is served")
        return value

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


class Reply:
    """Builds the objects of one answer: whole, or chunk by chunk."""

    def __init__(self, request_id: str, model: str, chat: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self._model, self._chat, self._created = model, chat, int(time.time())

    def whole(self, text: str, finish: str, counted: Usage) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {**self._head(""), "choices": [self._choice(content, finish)], "usage": counted.model_dump()}

    def chunk(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if first:
            delta["role"] = "assistant"
        content = {"delta": delta} if self._chat else {"text": text}
        return {**self._head(".chunk"), "choices": [self._choice(content, finish)]}

    def usage_chunk(self, counted: Usage) -> dict[str, Any]:
        return {**self._head(".chunk"), "choices": [], "usage": counted.model_dump()}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def model_list(model: str, created: int, max_context_tokens: int, *, chat_template: bool) -> dict[str, Any]:
    """The one model served here. `chat_template`: whether it answers chat completions."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "farspan"}
    more = {"max_model_len": max_context_tokens, "chat_template": chat_template}
    return {"object": "list", "data": [{**entry, **more}]}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
