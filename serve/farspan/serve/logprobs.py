"""Log-probabilities in OpenAI's two forms: of chats, and of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from farspan.engine.request import TokenLogprobs
from farspan.serve.text import TokenNames

# JSON has no infinity; OpenAI's clients know this number for it.
_NEVER = -9999.0


def chat_logprobs(found: Sequence[TokenLogprobs], names: TokenNames, num_top: int) -> dict[str, Any]:
    """One entry for each token."""
    content = [
        {
            **_entry(one.token, one.logprob, names),
            "top_logprobs": [_entry(token, value, names) for token, value in one.top[:num_top]],
        }
        for one in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    found: Sequence[TokenLogprobs | int], offsets: Sequence[int], names: TokenNames, num_top: int
) -> dict[str, Any]:
    """Four lists of one length. A bare token is the first one of a prompt: nothing was said before it."""
    tokens = [one if isinstance(one, int) else one.token for one in found]
    return {
        "tokens": [names.name_of(token) for token in tokens],
        "token_logprobs": [None if isinstance(one, int) else _finite(one.logprob) for one in found],
        "top_logprobs": [None if isinstance(one, int) else _top(one, names, num_top) for one in found],
        "text_offset": list(offsets),
    }


def _top(one: TokenLogprobs, names: TokenNames, num_top: int) -> dict[str, float]:
    # The token itself belongs to it, also where it is not among the most likely ones.
    pairs = [(one.token, one.logprob), *reversed(one.top[:num_top])] if num_top else [(one.token, one.logprob)]
    return {names.name_of(token): _finite(value) for token, value in pairs}


def _entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.name_of(token), "logprob": _finite(logprob), "bytes": list(names.bytes_of(token))}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _NEVER
