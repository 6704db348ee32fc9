"""Fields known elsewhere and not served here, and whatever else a request holds that nobody reads. Plain values."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from farspan.engine.forms import IDLE
from farspan.serve.shape import ApiError, Shape

# What each of these fields may say where it is not served: the values that change nothing. null is always one. The
# path of a field has no places of lists in it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "messages": ([],),
    "messages.audio": (),
    "messages.function_call": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt": ("", []),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
    # vLLM's.
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "guided_json_object": (False,),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "messages.tools": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    # Only slow tokenizers write them, and only where special tokens are shown.
    "spaces_between_special_tokens": (True, False),
    **{f"structured_outputs.{name}": harmless for name, harmless in IDLE.items()},
    "structured_outputs.structural_tag": (),
    "structured_outputs.whitespace_pattern": (),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # Of other servers.
    "custom_logit_processor": (),
    "ebnf": (),
    "grammar": (),
    "json_schema": (),
    "lora_path": (),
    "messages.partial": (False,),
    "messages.prefix": (False,),
    "mirostat": (0,),
    "no_stop_trim": (False,),
    "regex": (),
    "repeat_penalty": (1,),
    "response_format.schema": (),
    "return_hidden_states": (False,),
    "stop_regex": ([],),
    "tfs_z": (1,),
    "typical_p": (1,),
}
# What serves the same purpose.
_INSTEAD = {
    "ebnf": "structured_outputs",
    "function_call": "tool_choice",
    "functions": "tools",
    "grammar": "structured_outputs",
    "guided_json_object": "structured_outputs",
    "json_schema": "response_format",
    "lora_path": "model",
    "max_completion_tokens": "max_tokens",
    "messages": "/v1/chat/completions",
    "messages.function_call": "tool_calls",
    "messages.partial": "continue_final_message",
    "messages.prefix": "continue_final_message",
    "messages.tools": "tools",
    "prompt": "/v1/completions",
    "prompt_logprobs": "echo with logprobs",
    "regex": "structured_outputs",
    "repeat_penalty": "repetition_penalty",
    "response_format.schema": "the type json_schema",
    "stop_regex": "stop",
    "tools": "/v1/chat/completions",
}
# Whatever stands in these and is not served would change the answer.
_CLOSED = frozenset({"structured_outputs"})
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
"""What may be repeated of names that come from outside."""


def passed_over(asked: Shape, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Where `given`, which was read as `asked`, holds fields that change nothing here; each once, in its first place.

    Raises:
        ApiError: a field would change the answer and is not served.
    """
    found: dict[str, str] = {}
    for path, place, value in _unread(asked, given):
        neutral = NEUTRAL.get(path)
        if neutral is None and path.rpartition(".")[0] not in _CLOSED:
            found.setdefault(path, place)
        elif not any(_same(value, harmless) for harmless in neutral or ()):
            raise _unserved(path, place, value)
    return tuple(found.values())


def shown(value: Any) -> str:
    """A value as it is told to whoever wrote it."""
    # It may have millions of parts: no more of it is written than is told.
    written = value[:80] if isinstance(value, str) else reprlib.repr(value)[:80]
    return repr(written)


def _unread(
    asked: Shape, given: Mapping[str, Any], above: str = "", around: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """(path, place, value) of each field nobody reads: `place` says which items of lists it is in, `path` does not."""
    names = _names(type(asked))
    for name, value in given.items():
        if value is None:
            # Clients write null where they mean the default.
            continue
        path, place = f"{above}{name}", f"{around}{name}"
        if name not in names:
            yield path, place, value
            continue
        read = getattr(asked, names[name])
        if isinstance(read, Shape) and isinstance(value, dict):
            yield from _unread(read, value, f"{path}.", f"{place}.")
        elif isinstance(read, list) and isinstance(value, list) and read and isinstance(read[0], Shape):
            for number, (part, written) in enumerate(zip(read, value, strict=True)):
                yield from _unread(part, written, f"{path}.", f"{place}.{number}.")


@cache
def _names(shape: type[Shape]) -> Mapping[str, str]:
    """What a request calls each field, and what we do."""
    return {field.alias or name: name for name, field in shape.model_fields.items()}


def _unserved(path: str, place: str, value: Any) -> ApiError:
    neutral = NEUTRAL.get(path, ())
    way_out = "leave it out" + (f" or send {json.dumps(neutral[0])}" if neutral else "")
    way_out += f", or use {_INSTEAD[path]}" if path in _INSTEAD else ""
    place = place if PLAIN_NAME.fullmatch(place) else place.partition(".")[0]
    return ApiError(
        400, f"{place}: is not served here, got {shown(value)}; {way_out}", code="unsupported_value", param=place
    )


def _same(given: Any, neutral: Any) -> bool:
    # 0 == False in Python, but logprobs=0 asks for something and logprobs=false does not.
    return isinstance(given, bool) == isinstance(neutral, bool) and bool(given == neutral)
