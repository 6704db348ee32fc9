"""What completions ask for, and what they share with chats. What is known and not served is in unserved.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from farspan.engine.check import LONGEST_BAD_WORD, MOST_ALLOWED, MOST_BAD_WORDS
from farspan.engine.forms import MOST_TEXTS
from farspan.engine.request import Grammar
from farspan.serve.forms import JsonForm, ResponseFormat, StructuredOutputs, form_of
from farspan.serve.shape import Items, Shape

# Every token of every answer is compared with these.
_MOST_STOPS, _LONGEST_STOP, _MOST_STOP_TOKENS, _MOST_BIASES = 16, 1000, 1000, 1000
# Likely tokens beside each token: each is a string in the answer.
MOST_LOGPROBS = 20
# Answers of one request, over all its prompts.
MOST_CHOICES = 128
_LONGEST_SALT = 256
# More than any text of a body of the usual size has.
_MOST_TOKENS = 2_097_152
# Four weeks: no answer takes so long, and no clock overflows.
_LONGEST_DEADLINE_S = 2_419_200.0

StopString = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
BadWord = Annotated[str, Field(min_length=1, max_length=LONGEST_BAD_WORD)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
# JSON has only strings as names.
TokenName = Annotated[int, Field(strict=False)]
Prompt = str | Items[int]
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "maxItems": MOST_CHOICES, "items": {"type": "string"}},
        {"type": "array", "maxItems": MOST_CHOICES, "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
_STOPS = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP},
        {
            "type": "array",
            "maxItems": _MOST_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP},
        },
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
    allowed_token_ids: Items[int] | None = Field(
        default=None, min_length=1, max_length=MOST_ALLOWED, description="no other token is chosen, ends included"
    )
    bad_words: Items[BadWord] = Field(
        default_factory=list, max_length=MOST_BAD_WORDS, description="not written, with a space before them or without"
    )
    min_tokens: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[Items[StopString], WithJsonSchema(_STOPS)] = Field(default_factory=list, max_length=_MOST_STOPS)
    include_stop_str_in_output: bool = Field(default=False, description="the text ends with the stop that ended it")
    stop_token_ids: Items[int] = Field(default_factory=list, max_length=_MOST_STOP_TOKENS)
    ignore_eos: bool = False
    skip_special_tokens: bool = Field(default=True, description="false: the text has special tokens in it")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="no more of a prompt is read; -1: no more than leaves room for the answer"
    )
    truncation_side: Literal["left", "right"] = Field(default="left", description="where a prompt is cut")
    return_token_ids: bool = False
    response_format: ResponseFormat = Field(default_factory=lambda: ResponseFormat(type="text"))
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonForm | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = Field(default=None, max_length=MOST_TEXTS)
    guided_grammar: str | None = None
    priority: int = Field(default=0, ge=-1000, le=1000, description="lower is answered first")
    deadline_s: float | None = Field(default=None, gt=0, le=_LONGEST_DEADLINE_S, description="seconds from now")
    cache_salt: str | None = Field(default=None, min_length=1, max_length=_LONGEST_SALT)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        # Before its values are looked at: each wrong one would be noted.
        if isinstance(value, dict) and len(value) > _MOST_BIASES:
            raise ValueError(f"must have at most {_MOST_BIASES} tokens, got {len(value)}")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _not_nothing(cls, most: int | None) -> int | None:
        if most == 0:
            raise ValueError("must be at least 1, or -1 for as much as leaves room for the answer")
        return most

    @field_validator("allowed_token_ids", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("must name at least one token; leave it out to allow all")
        return value

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
    def num_answers(self) -> int:
        """Over all prompts."""
        return self.n

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
    prompt: Annotated[Items[Prompt], WithJsonSchema(_PROMPTS)]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
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
    def num_answers(self) -> int:
        return len(self.prompt) * self.n

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs


class DetokenizeRequest(Shape):
    model: str | None = None
    tokens: Items[int] = Field(max_length=_MOST_TOKENS)


def as_prompts(value: Any) -> list[Prompt]:
    """One prompt or many, as a list. Raises ValueError for anything else."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and len(value) > MOST_CHOICES and isinstance(value[0], str | list):
        raise ValueError(f"must be at most {MOST_CHOICES} prompts, got {len(value)}")
    if isinstance(value, list) and (all(isinstance(p, str) for p in value) or all(_is_tokens(p) for p in value)):
        return value
    raise ValueError("must be text, a list of tokens, a list of texts, or a list of lists of tokens")


def _is_tokens(value: Any) -> bool:
    # An empty list is an empty prompt, which the engine refuses with its own sentence.
    return isinstance(value, list) and all(type(token) is int for token in value)
