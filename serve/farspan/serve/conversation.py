"""What chats ask for: messages, tools, and whether one of them must be called."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

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


class ContentPart(Shape):
    """Words, or those with which an assistant said no."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _words_only(cls, given: Any) -> Any:
        if given not in ("text", "refusal"):
            raise ValueError("must be text or refusal, no other content is served")
        return given

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        other = "refusal" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} must have {self.type}, and no {other}")
        return self

    @property
    def words(self) -> str:
        return self.text or self.refusal or ""


class ChatMessage(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Items[ContentPart] = Field(default_factory=list)
    refusal: str | None = Field(default=None, description="what an assistant said instead of content")
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = Field(default=None, description="for templates that repeat it")
    reasoning_content: str | None = Field(default=None, description="another name of reasoning")

    @field_validator("content", mode="before", json_schema_input_type=str | Items[ContentPart] | None)
    @classmethod
    def _as_parts(cls, given: Any) -> Any:
        if isinstance(given, str):
            return [ContentPart(type="text", text=given)]
        if not isinstance(given, list):
            raise ValueError("must be text, or a list of parts")
        return given

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if self.refusal and self.content:
            raise ValueError("refusal: must be left out where there is content")
        if self.reasoning and self.reasoning_content not in (None, self.reasoning):
            raise ValueError("reasoning: must be what reasoning_content is; leave one out")
        return self

    @property
    def speaker(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """The words of the message."""
        return "".join(part.words for part in self.content) or self.refusal or ""

    @property
    def thoughts(self) -> str | None:
        return self.reasoning or self.reasoning_content


class Function(Shape):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = Field(default=False, description="calls that the model decides on fit parameters, too")

    @field_validator("parameters")
    @classmethod
    def _object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = "object" if schema is None else schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise ValueError("must be a JSON schema of type object")
        return schema


class Tool(Shape):
    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    name: str


class NamedTool(Shape):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Shape):
    mode: Literal["auto", "required"]
    tools: Items[NamedTool] = Field(min_length=1, max_length=MOST_CHOICES)


class AllowedChoice(Shape):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Mode = Literal["none", "auto", "required"]


class ToolChoice(Shape):
    """Whether a tool is called, and which may be."""

    type: Mode | Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type in ("function", "allowed_tools") and getattr(self, self.type) is None:
            raise ValueError(f"of type {self.type} must have {self.type}")
        return self

    @property
    def named(self) -> list[str]:
        """The tools it speaks of; none: of all."""
        if self.type == "function" and self.function is not None:
            return [self.function.name]
        if self.type == "allowed_tools" and self.allowed_tools is not None:
            return [tool.function.name for tool in self.allowed_tools.tools]
        return []

    @property
    def forces(self) -> bool:
        """Whether one of them must be called."""
        needed = self.allowed_tools is not None and self.allowed_tools.mode == "required"
        return self.type in ("required", "function") or (self.type == "allowed_tools" and needed)


class ChatFields(Shape):
    """What a conversation is, before anything is answered."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=_MOST_MESSAGES)
    tools: Items[Tool] = Field(default_factory=list, max_length=MOST_CHOICES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

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
    tool_choice: ToolChoice = Field(default_factory=lambda: ToolChoice(type="auto"))
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(default=None, max_length=64, description="told to templates that read it")

    @field_validator("tool_choice", mode="before", json_schema_input_type=Mode | NamedTool | AllowedChoice)
    @classmethod
    def _as_choice(cls, given: Any) -> Any:
        if isinstance(given, str) and given in get_args(Mode):
            return {"type": given}
        if isinstance(given, dict) and given.get("type") in ("function", "allowed_tools"):
            return given
        raise ValueError("must be none, auto, required, or an object of type function or allowed_tools")

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: must have different names")
        stranger = next((name for name in self.tool_choice.named if name not in names), None)
        if stranger is not None:
            raise ValueError(f"tool_choice: must name one of tools, got {stranger[:80]!r}")
        if self.tool_choice.forces and not names:
            raise ValueError("tool_choice: required needs tools")
        if self.tool_choice.forces and self.form() is not None:
            raise ValueError("tool_choice: forces a call, so the answer can have no other form; leave one out")
        return self

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which one must be called; none: the model decides."""
        return self._chosen if self.tool_choice.forces else []

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools the model is told of."""
        if self.tool_choice.type == "allowed_tools":
            return self._chosen
        return [] if self.tool_choice.type == "none" else self.tools

    @property
    def several_calls(self) -> bool:
        """Whether an answer may have more than one."""
        return self.parallel_tool_calls and self.tool_choice.type != "function"

    @property
    def _chosen(self) -> list[Tool]:
        named = self.tool_choice.named
        return [tool for tool in self.tools if tool.function.name in named] if named else self.tools

    @property
    def answer_tokens(self) -> int | None:
        """Either name is a bound."""
        return min((most for most in (self.max_completion_tokens, self.max_tokens) if most is not None), default=None)

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
