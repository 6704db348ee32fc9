"""What chats ask for: messages, tools, and whether one of them must be called."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from farspan.serve.shape import Items, Shape
from farspan.serve.wire import MOST_CHOICES, MOST_LOGPROBS, GenerationFields

# The longest conversations of agents have thousands.
_MOST_MESSAGES = 16_384


class FunctionCall(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Shape):
    role: str
    content: str | Items[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
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

    messages: Items[ChatMessage] = Field(min_length=1, max_length=_MOST_MESSAGES)
    tools: Items[Tool] = Field(default_factory=list, max_length=MOST_CHOICES)
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
    top_logprobs: int = Field(default=0, ge=0, le=MOST_LOGPROBS)
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
    messages: Items[ChatMessage] = Field(default_factory=list, max_length=_MOST_MESSAGES)
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: give exactly one of prompt and messages")
        return self
