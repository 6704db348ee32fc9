"""From what a client wrote to the tokens a model reads."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from farspan.engine.detokenize import Detokenizer
from farspan.serve.conversation import ChatFields, ChatMessage, ChatRequest, TokenizeRequest, Tool
from farspan.serve.reply import Prompted
from farspan.serve.shape import ApiError
from farspan.serve.wire import CompletionRequest, GenerationFields, Prompt

_LONGEST_REASON = 300


def prompt_tokens(tokenizer: Any, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of one prompt of a completion."""
    if isinstance(prompt, list):
        return prompt
    tokens: list[int] = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    return tokens


def completion_prompts(tokenizer: Any, asked: CompletionRequest, telling: Any, room: int) -> list[Prompted]:
    """Each prompt, with its text, as `telling` decodes it, where it is to be told with the answer.

    `room`: see `cut`.
    """
    made = []
    for prompt in asked.prompt:
        tokens = cut(prompt_tokens(tokenizer, prompt, add_special_tokens=asked.add_special_tokens), asked, room)
        made.append(_echoed(tokenizer, telling, tokens) if asked.echo else Prompted(tokens))
    return made


def cut(tokens: list[int], asked: GenerationFields, room: int) -> tuple[int, ...]:
    """What is read of a prompt. `room`: the tokens that may be read where the answer is to fit, too."""
    most = room if asked.truncate_prompt_tokens == -1 else asked.truncate_prompt_tokens
    if most is None or most >= len(tokens):
        return tuple(tokens)
    return tuple(tokens[-most:] if asked.truncation_side == "left" else tokens[:most])


def tokenized(tokenizer: Any, asked: TokenizeRequest) -> list[int]:
    """The tokens that a completion or a chat of the same words would begin with."""
    if asked.prompt is None:
        if asked.tools:
            template_with_tools(tokenizer)
        return chat_prompt(tokenizer, asked, asked.tools)
    return prompt_tokens(tokenizer, asked.prompt, add_special_tokens=asked.add_special_tokens)


def detokenized(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens, special ones included. Raises ApiError for what is no token."""
    outside = next((token for token in tokens if not 0 <= token < len(tokenizer)), None)
    if outside is not None:
        message = f"tokens: must lie in the vocabulary 0..{len(tokenizer) - 1}, got {outside}"
        raise ApiError(400, message, code="invalid_value", param="tokens")
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _echoed(tokenizer: Any, telling: Any, tokens: tuple[int, ...]) -> Prompted:
    text = Detokenizer(telling)
    offsets, told = [], ""
    for token in tokens:
        offsets.append(len(told))
        # A token outside the vocabulary has no text; the engine refuses it with a sentence.
        told += text.push([token]) if 0 <= token < len(tokenizer) else ""
    return Prompted(tokens, True, told + text.finish(), tuple(offsets))


def chat_prompt(tokenizer: Any, asked: ChatFields, tools: list[Tool]) -> list[int]:
    """The tokens of a conversation, by the model's own chat template. Raises ApiError when it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(
            400,
            "messages: this model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    words = {**_of_effort(asked), **_template_words(tokenizer, asked.chat_template_kwargs)}
    try:
        text: str = tokenizer.apply_chat_template(
            [_as_template_message(message) for message in asked.messages],
            tools=[tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            **words,
        )
    # Templates are jinja programs of the model's author: any error in one is about these messages.
    except Exception as problem:
        reason = " ".join(str(problem).split())[:_LONGEST_REASON]
        raise ApiError(400, f"messages: the chat template refuses them: {reason}", param="messages") from None
    return prompt_tokens(tokenizer, text, add_special_tokens=False)


def template_with_tools(tokenizer: Any) -> str:
    """The chat template, where it has a place for tools. Raises ApiError where it has none."""
    template = _template(tokenizer, tools=[])
    if "tools" not in template:
        message = "tools: this model's chat template has no place for tools; leave them out"
        raise ApiError(400, message, code="unsupported_value", param="tools")
    return template


def unread(tokenizer: Any, asked: ChatFields) -> tuple[str, ...]:
    """Places of fields for the chat template that this model's does not read."""
    effort = _of_effort(asked)
    if not (effort or asked.chat_template_kwargs):
        return ()
    template = _template(tokenizer, tools=list(asked.tools) or None)
    places = [f"chat_template_kwargs.{name}" for name in asked.chat_template_kwargs if not _reads(template, name)]
    if effort and not any(_reads(template, name) for name in effort):
        places.append("reasoning_effort")
    return tuple(places)


def _template(tokenizer: Any, tools: list[Any] | None) -> str:
    return str(tokenizer.get_chat_template(tools=tools)) if getattr(tokenizer, "chat_template", None) else ""


def _reads(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _of_effort(asked: ChatFields) -> dict[str, Any]:
    """What templates call the effort of reasoning."""
    effort = asked.reasoning_effort if isinstance(asked, ChatRequest) else None
    return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _template_words(tokenizer: Any, words: dict[str, Any]) -> dict[str, Any]:
    """What a template may read, such as enable_thinking; how it is applied is not the client's to say."""
    ours = inspect.signature(tokenizer.apply_chat_template).parameters
    taken = next((name for name in words if name in ours), None)
    if taken is not None:
        message = f"chat_template_kwargs: must hold variables of the template only, got {taken}; leave it out"
        raise ApiError(400, message, code="invalid_value", param="chat_template_kwargs")
    return words


def _as_template_message(message: ChatMessage) -> dict[str, Any]:
    words: dict[str, Any] = {"role": message.speaker, "content": message.text}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            words[name] = getattr(message, name)
    if message.thoughts:
        # Templates have either name for it.
        words["reasoning"] = words["reasoning_content"] = message.thoughts
    if message.tool_calls:
        # Templates write arguments as JSON themselves: text would be quoted a second time.
        words["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _as_object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return words


def _as_object(arguments: str) -> Any:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
