"""The OpenAI-compatible requests, torch-free. What is known and not served is refused in body.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from farspan.engine.request import Grammar
from farspan.serve.forms import ResponseFormat, StructuredOutputs, form_of
from farspan.serve.shape import Shape

# Every token of every answer is compared with these.
_MOST_STOPS, _LONGEST_STOP, _MOST_STOP_TOKENS, _MOST_BIASES = 16, 1000, 1000, 1000
# Likely tokens beside each token: each is a string in the answer.
_MOST_LOGPROBS = 20
# Answers of one request, over all its prompts.
MOST_CHOICES = 128
_LONGEST_SALT = 256
# Four weeks: no answer takes so long, and no clock overflows.
_LONGEST_DEADLINE_S = 2_419_200.0

StopString = Annotated[str, Field(max_length=_LONGEST_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
# JSON has only strings as names.
TokenName = Annotated[int, Field(strict=False)]
Prompt = str | list[int]
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
_STOPS = {
    "anyOf": [
        {"type": "string", "maxLength": _LONGEST_STOP},
        {"type": "array", "maxItems": _MOST_STOPS, "items": {"type": "string", "maxLength": _LONGEST_STOP}},
    ]
}


class StreamOptions(Shape):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(Shape):
    """What completions and chat completions have in common."""

    model: str
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: all")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[TokenName, Bias] = Field(default_factory=dict, max_length=_MOST_BIASES)
    min_tokens: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], WithJsonSchema(_STOPS)] = Field(default_factory=list, max_length=_MOST_STOPS)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=_MOST_STOP_TOKENS)
    ignore_eos: bool = False
    return_token_ids: bool = False
    response_format: ResponseFormat = Field(default_factory=lambda: ResponseFormat(type="text"))
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int = Field(default=0, ge=-1000, le=1000, description="lower is answered first")
    deadline_s: float | None = Field(default=None, gt=0, le=_LONGEST_DEADLINE_S, description="seconds from now")
    cache_salt: str | None = Field(default=None, min_length=1, max_length=_LONGEST_SALT)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        self.form()
        return self

    def form(self) -> Grammar | None:
        """What the answer is held to. Raises ValueError when it is held to two things."""
        older = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        return form_of(self.response_format, self.structured_outputs, older)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def num_top_logprobs(self) -> int | None:
        """How many likely tokens are told beside each token; none: no log-probabilities at all."""
        raise NotImplementedError


class CompletionRequest(GenerationFields):
    prompt: Annotated[list[Prompt], WithJsonSchema(_PROMPTS)]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_prompts(cls, value: Any) -> list[Prompt]:
        return as_prompts(value)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.prompt) * self.n > MOST_CHOICES:
            raise ValueError(
                f"n: prompts times n must be at most {MOST_CHOICES}, got {len(self.prompt)} times {self.n}"
            )
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of: must equal n: all answers are given, got {self.best_of}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: must be at least 1 without echo, got 0")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs


class FunctionCall(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Shape):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The words of the message."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content)
        return self.content or ""


class Function(Shape):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    name: str


class NamedTool(Shape):
    type: Literal["function"]
    function: NamedFunction


class ChatFields(Shape):
    """What a conversation is, before anything is answered."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_CHOICES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("messages")
    @classmethod
    def _text_only(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        for message in value:
            parts = message.content if isinstance(message.content, list) else []
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
                raise ValueError("only text content is served")
        return value

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: needs add_generation_prompt=false: the last message goes on")
        return self


class ChatRequest(ChatFields, GenerationFields):
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=_MOST_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: must have different names")
        if named is not None and named not in names:
            raise ValueError(f"tool_choice: must name one of tools, got {named[:80]!r}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        if self.forced_tools and self.form() is not None:
            raise ValueError("tool_choice: forces a call, so the answer can have no other form; leave one out")
        return self

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which one must be called; none: the model decides."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeRequest(ChatFields):
    """A prompt, or a conversation."""

    model: str | None = None
    messages: list[ChatMessage] = Field(default_factory=list)
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: give exactly one of prompt and messages")
        return self


class DetokenizeRequest(Shape):
    model: str | None = None
    tokens: list[int]


def as_prompts(value: Any) -> list[Prompt]:
    """One prompt or many, as a list. Raises ValueError for anything else."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and (all(isinstance(p, str) for p in value) or all(_is_tokens(p) for p in value)):
        return value
    raise ValueError("must be text, a list of tokens, a list of texts, or a list of lists of tokens")


def _is_tokens(value: Any) -> bool:
    # An empty list is an empty prompt, which the engine refuses with its own sentence.
    return isinstance(value, list) and all(type(token) is int for token in value)
