"""What the requests of each endpoint come down to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from farspan.engine.request import Grammar
from farspan.serve.answering import Question
from farspan.serve.conversation import ChatRequest
from farspan.serve.prompt import chat_prompt, completion_prompts, cut, unread
from farspan.serve.reply import Prompted, Style
from farspan.serve.shape import ApiError
from farspan.serve.tools import (
    CallFormat,
    call_format,
    calls_grammar,
    reader_of,
    special_tokens,
    telling_of,
    words_or_calls_grammar,
)
from farspan.serve.wire import CompletionRequest

_ANY_OBJECT = '{"type": "object"}'


def completion_question(tokenizer: Any, asked: CompletionRequest) -> Question:
    telling = telling_of(tokenizer, asked)
    style = Style(
        chat=False,
        num_top=asked.num_top_logprobs,
        token_ids=asked.return_token_ids,
        prompt_only=asked.max_tokens == 0,
    )
    return Question(
        asked=asked,
        read=lambda room: completion_prompts(tokenizer, asked, telling, room),
        max_tokens=asked.max_tokens,
        style=style,
        grammar=asked.form(),
        telling=telling,
    )


def chat_question(tokenizer: Any, asked: ChatRequest, tool_format: str) -> Question:
    """Raises ApiError when the model, or the form of the answer, has no place for tools."""
    style = Style(chat=True, num_top=asked.num_top_logprobs, token_ids=asked.return_token_ids)
    tools = asked.offered_tools

    def read(room: int) -> list[Prompted]:
        return [Prompted(cut(chat_prompt(tokenizer, asked, tools), asked, room))]

    question = Question(
        asked=asked,
        read=read,
        max_tokens=asked.answer_tokens,
        style=style,
        grammar=asked.form(),
        telling=telling_of(tokenizer, asked),
        passed_over=unread(tokenizer, asked),
    )
    if not tools:
        return question
    written = call_format(tokenizer, tool_format)
    return replace(
        question,
        grammar=_grammar(asked, written, special_tokens(tokenizer)),
        reader=lambda: reader_of(written, tools, several=asked.parallel_tool_calls),
        telling=telling_of(tokenizer, asked, tags=True),
    )


def _grammar(asked: ChatRequest, written: CallFormat, special: Mapping[str, int]) -> Grammar | None:
    forced, form = asked.forced_tools, asked.form()
    several = asked.several_calls
    if forced:
        return calls_grammar(written, forced, special, several=several)
    if form is None:
        strict = any(tool.function.strict for tool in asked.offered_tools)
        return words_or_calls_grammar(written, asked.offered_tools, special) if strict else None
    # Bare calls are JSON too: what begins with a brace could be either, and no lexer goes back.
    if written != "hermes" or form.kind not in ("json_schema", "json_object"):
        message = (
            f"structured_outputs: a {form.kind} leaves no place for calls of tools as this model writes them; "
            "set tool_choice=none, or leave the form out"
        )
        raise ApiError(400, message, code="invalid_value", param="structured_outputs")
    return calls_grammar(written, asked.offered_tools, special, several=several, otherwise=form.source or _ANY_OBJECT)
