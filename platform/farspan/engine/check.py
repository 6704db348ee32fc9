"""What makes a request one that can never be answered, whatever the load."""

from __future__ import annotations

import math
from collections.abc import Sequence

from farspan.engine.request import SamplingParams
from farspan.errors import RequestError

_MOST_LOGPROBS = 1000
# The mask of each answer is made of them, and every word is spelled, by the thread all requests share.
MOST_ALLOWED, MOST_BAD_WORDS, LONGEST_BAD_WORD = 10_000, 1000, 100


def check_prompt(
    request_id: str, tokens: Sequence[int], num_prompt: int, params: SamplingParams, vocab_size: int
) -> None:
    """Raises RequestError with the field, its rule and its value."""
    reason = _broken_prompt(tokens, num_prompt, vocab_size) or broken_params(params, vocab_size)
    if reason:
        raise RequestError(request_id, reason)


def _broken_prompt(tokens: Sequence[int], num_prompt: int, vocab_size: int) -> str | None:
    if num_prompt < 1:
        return "the prompt is empty; give at least one token"
    if min(tokens) >= 0 and max(tokens) < vocab_size:
        return None
    outside = next(token for token in tokens if not 0 <= token < vocab_size)
    return f"prompt must hold tokens of the model, but {outside} is outside the vocabulary 0..{vocab_size - 1}"


def broken_params(params: SamplingParams, vocab_size: int) -> str | None:
    """The first rule that the parameters break."""
    for field, rule, value, holds in _rules(params, vocab_size):
        if not holds:
            return f"{field} must {rule}, got {value}"
    return None


def _rules(params: SamplingParams, vocab_size: int) -> list[tuple[str, str, object, bool]]:
    p, infinity = params, math.inf
    outside = [token for token, _ in p.logit_bias if not 0 <= token < vocab_size]
    unknown = [token for token in p.allowed_token_ids if not 0 <= token < vocab_size]
    odd = [word[:80] for word in p.bad_words if not 1 <= len(word) <= LONGEST_BAD_WORD]
    num_allowed, num_bad = len(p.allowed_token_ids), len(p.bad_words)
    crooked = [bias for _, bias in p.logit_bias if not -infinity < bias < infinity]
    # Comparisons with NaN are false: written so that NaN breaks each rule.
    return [
        ("max_tokens", "be at least 1", p.max_tokens, p.max_tokens >= 1),
        ("min_tokens", f"lie in 0..max_tokens={p.max_tokens}", p.min_tokens, 0 <= p.min_tokens <= p.max_tokens),
        ("temperature", "be 0 or more", p.temperature, 0 <= p.temperature < infinity),
        ("top_p", "lie in (0, 1]", p.top_p, 0 < p.top_p <= 1),
        ("top_k", "be 0 (all) or more", p.top_k, p.top_k >= 0),
        ("min_p", "lie in [0, 1]", p.min_p, 0 <= p.min_p <= 1),
        ("repetition_penalty", "be more than 0", p.repetition_penalty, 0 < p.repetition_penalty < infinity),
        ("presence_penalty", "be a finite number", p.presence_penalty, math.isfinite(p.presence_penalty)),
        ("frequency_penalty", "be a finite number", p.frequency_penalty, math.isfinite(p.frequency_penalty)),
        ("logit_bias", f"name tokens of the vocabulary 0..{vocab_size - 1}", outside[:1], not outside),
        ("logit_bias", "be finite numbers", crooked[:1], not crooked),
        ("allowed_token_ids", f"name at most {MOST_ALLOWED} tokens", num_allowed, num_allowed <= MOST_ALLOWED),
        ("allowed_token_ids", f"name tokens of the vocabulary 0..{vocab_size - 1}", unknown[:1], not unknown),
        ("bad_words", f"hold at most {MOST_BAD_WORDS} words", num_bad, num_bad <= MOST_BAD_WORDS),
        ("bad_words", f"hold words of 1 to {LONGEST_BAD_WORD} characters", odd[:1], not odd),
        ("n", "be 1 in one request of the engine; ask for each of `choices`", p.n, p.n == 1),
        ("choice", "be 0 or more", p.choice, p.choice >= 0),
        ("stop", "not hold an empty string", "''", all(p.stop)),
        ("logprobs", f"lie in 0..{_MOST_LOGPROBS}", p.logprobs, _is_count(p.logprobs)),
        ("prompt_logprobs", f"lie in 0..{_MOST_LOGPROBS}", p.prompt_logprobs, _is_count(p.prompt_logprobs)),
    ]


def _is_count(value: int | None) -> bool:
    return value is None or 0 <= value <= _MOST_LOGPROBS
