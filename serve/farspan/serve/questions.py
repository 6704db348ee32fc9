"""What the requests of each endpoint come down to."""

from __future__ import annotations

from typing import Any

from farspan.engine.request import Grammar
from farspan.serve.answering import Question
from farspan.serve.conversation import ChatRequest
from farspan.serve.prompt import chat_prompt, completion_prompts
from farspan.serve.reply import Prompted, Style
from farspan.serve.shape import ApiError
from farspan.serve.tools import CallFormat, call_format, calls_grammar, reader_of, showing_tags
from farspan.serve.wire import CompletionRequest

_ANY_OBJECT = '{"type": "object"}'


def completion_question(tokenizer: Any, asked: CompletionRequest) -> Question:
    style = Style(
        chat=False,
        num_top=asked.num_top_logprobs,
        token_ids=asked.return_token_ids,
        prompt_only=asked.max_tokens == 0,
    )
    return Question(
        asked=asked,
        read=lambda: completion_prompts(tokenizer, asked),
        max_tokens=asked.max_tokens,
        style=style,
        grammar=asked.form(),
    )


def chat_question(tokenizer: Any, asked: ChatRequest, tool_format: str) -> Question:
    """Raises ApiError when the model, or the form of the answer, has no place for tools."""
    style = Style(chat=True, num_top=asked.num_top_logprobs, token_ids=asked.return_token_ids)
    tools = asked.offered_tools

    def read() -> list[Prompted]:
        return [Prompted(tuple(chat_prompt(tokenizer, asked, tools)))]

    most = asked.answer_tokens
    if not tools:
        return Question(asked=asked, read=read, max_tokens=most, style=style, grammar=asked.form())
    written = call_format(tokenizer, tool_format)
    return Question(
        asked=asked,
        read=read,
        max_tokens=most,
        style=style,
        grammar=_grammar(asked, written),
        reader=lambda: reader_of(written, tools, several=asked.parallel_tool_calls),
        telling=showing_tags(tokenizer),
    )


def _grammar(asked: ChatRequest, written: CallFormat) -> Grammar | None:
    forced, form = asked.forced_tools, asked.form()
    several = asked.parallel_tool_calls
    if forced:
        return calls_grammar(written, forced, several=several and asked.tool_choice == "required")
    if form is None:
        return None
    # Bare calls are JSON too: what begins with a brace could be either, and no lexer goes back.
    if written != "hermes" or form.kind not in ("json_schema", "json_object"):
        message = (
            f"structured_outputs: a {form.kind} leaves no place for calls of tools as this model writes them; "
            "set tool_choice=none, or leave the form out"
        )
        raise ApiError(400, message, code="invalid_value", param="structured_outputs")
    return calls_grammar(written, asked.tools, several=several, otherwise=form.source or _ANY_OBJECT)
