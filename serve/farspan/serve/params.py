"""From the fields of a request to what each of its answers asks of the engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from farspan.engine.request import Grammar, SamplingParams
from farspan.serve.wire import CompletionRequest, GenerationFields


def sampling(asked: GenerationFields, max_tokens: int, ends: Sequence[int], grammar: Grammar | None) -> SamplingParams:
    """Parameters of the first answer to a prompt. `ends`: tokens that end any answer of this tokenizer."""
    echoes = isinstance(asked, CompletionRequest) and asked.echo
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=max(0, asked.top_k),
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=tuple(asked.logit_bias.items()),
        allowed_token_ids=frozenset(asked.allowed_token_ids or ()),
        bad_words=tuple(asked.bad_words),
        grammar=grammar,
        # One number for all answers: `choice` tells them apart.
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        # The engine looks for them in text without special tokens; in any other they are looked for where it is made.
        stop=tuple(asked.stop) if asked.skip_special_tokens else (),
        include_stop_str_in_output=asked.include_stop_str_in_output,
        stop_token_ids=frozenset((*asked.stop_token_ids, *(() if asked.ignore_eos else ends))),
        ignore_eos=asked.ignore_eos,
        logprobs=asked.num_top_logprobs,
        prompt_logprobs=asked.num_top_logprobs if echoes else None,
    )
