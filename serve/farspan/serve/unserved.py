"""What a request says that is not served: refused where it would change the answer, otherwise told as passed over."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

from farspan.serve.shape import ApiError, Shape

# A conversation has room for millions of names, the header of an answer for a few.
_MOST_KINDS = 100
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# What each of these fields may say where it is not served: the value that changes nothing. null is always one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
    # vLLM's.
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}


def refuse_unserved(fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], path: str = "") -> None:
    """Raises ApiError 400 for the first that asks for something. `path`: of what they lie in, with a dot."""
    for name, harmless in neutral.items():
        given = fields.get(name)
        if given is not None and not any(_same(given, value) for value in harmless):
            raise _unserved(path + name, given, harmless)


def unknown_members(shape: type[Shape], given: Mapping[str, Any]) -> list[str]:
    """What lies in the fields of a request that was read as `shape`, and nobody knows: of each kind the first place.

    Raises ApiError 400 for what would change the answer.
    """
    found: dict[str, str] = {}
    for name, inner in _shapes_in(shape).items():
        if inner is not None:
            _look_into(inner, given.get(name), name, name, found)
    return list(found.values())


def shown(value: Any) -> str:
    """A value as an error repeats it."""
    # A value may have millions of parts: no more of it is written than is told.
    written = value[:80] if isinstance(value, str) else reprlib.repr(value)[:80]
    return repr(written)


def _look_into(shape: type[Shape], given: Any, path: str, kind: str, found: dict[str, str]) -> None:
    """`path` says where it is, `kind` the same without places in lists."""
    if isinstance(given, list):
        for place, part in enumerate(given):
            _look_into(shape, part, f"{path}.{place}", kind, found)
    if not isinstance(given, dict):
        return
    refuse_unserved(given, shape.unserved, f"{path}.")
    known = _shapes_in(shape)
    for name, value in given.items():
        if name in known:
            if (inner := known[name]) is not None:
                _look_into(inner, value, f"{path}.{name}", f"{kind}.{name}", found)
        elif value is not None and name not in shape.unserved:
            if shape.closed:
                raise _unserved(*((f"{path}.{name}", value) if _PLAIN_NAME.fullmatch(name) else (path, name)), ())
            if len(found) < _MOST_KINDS:
                found.setdefault(f"{kind}.{name}", f"{path}.{name}")


@cache
def _shapes_in(shape: type[Shape]) -> dict[str, type[Shape] | None]:
    """Every field by the name clients have for it, and the shape of what lies in it."""
    fields = shape.model_fields.items()
    return {field.alias or name: shape.loose.get(name) or _shape_of(field.annotation) for name, field in fields}


def _shape_of(annotation: Any) -> type[Shape] | None:
    if isinstance(annotation, type) and issubclass(annotation, Shape):
        return annotation
    return next((found for part in get_args(annotation) if (found := _shape_of(part)) is not None), None)


def _unserved(path: str, given: Any, neutral: tuple[Any, ...]) -> ApiError:
    way_out = "leave it out" + (f" or send {json.dumps(neutral[0])}" if neutral else "")
    message = f"{path}: is not served here, got {shown(given)}; {way_out}"
    return ApiError(400, message, code="unsupported_value", param=path)


def _same(given: Any, neutral: Any) -> bool:
    # 0 == False in Python, but logprobs=0 asks for something and logprobs=false does not.
    return isinstance(given, bool) == isinstance(neutral, bool) and bool(given == neutral)
