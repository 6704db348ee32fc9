"""Answers that fit a JSON schema, a regular expression or a grammar, by llguidance. S sequences, V vocabulary.

A matcher is where one sequence stands in its grammar. It is a function of the tokens accepted so far: whoever replays
them stands in the same place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import torch
from torch import Tensor

from farspan.engine.request import Grammar
from farspan.errors import RequestError

# What one request may cost the thread it shares with all others: about 50 ms for each mask, a second to compile.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000, verbose_errors=False
)
_LONGEST_MESSAGE = 500


class Matcher:
    """One sequence's place in its grammar."""

    def __init__(self, request_id: str, inner: llguidance.LLMatcher) -> None:
        self._request_id, self.inner = request_id, inner

    @property
    def ended(self) -> bool:
        """Nothing but the end of the text can follow."""
        return bool(self.inner.is_stopped())

    @property
    def complete(self) -> bool:
        """The tokens so far are a whole answer, which may or may not go on."""
        return bool(self.inner.is_accepting())

    def accept(self, token: int) -> None:
        """Go on by one token. Raises RequestError when it does not fit."""
        self.replay([token])

    def replay(self, tokens: Sequence[int]) -> None:
        """Go on by all of `tokens`. Raises RequestError when one does not fit."""
        if not self.inner.consume_tokens(list(tokens)):
            raise RequestError(self._request_id, f"grammar: {self.problem or 'the tokens do not fit'}")

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, could be accepted one after the other. Changes nothing."""
        return int(self.inner.validate_tokens(list(tokens)))

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens accepted."""
        if num_tokens and not self.inner.rollback(num_tokens):
            raise RequestError(self._request_id, f"grammar: cannot go back by {num_tokens} tokens")

    @property
    def problem(self) -> str:
        """Why the matcher can go nowhere; empty while it can."""
        return " ".join(self.inner.get_error().split())[:_LONGEST_MESSAGE] if self.inner.is_error() else ""


class GrammarCompiler:
    """Grammars over one tokenizer's vocabulary."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """`tokenizer`: a fast tokenizer of transformers. Raises ValueError for any other."""
        ends = sorted(eos_token_ids) or tokenizer.eos_token_id
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)

    def start(self, request_id: str, grammar: Grammar, answered: Sequence[int] = ()) -> Matcher:
        """A matcher that has accepted `answered`. Raises RequestError when no answer can fit, or these do not."""
        try:
            source = _SOURCES[grammar.kind](grammar.source)
        except ValueError as problem:
            raise RequestError(request_id, f"grammar: {grammar.kind} cannot be read: {problem}") from None
        matcher = Matcher(request_id, llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS))
        if matcher.problem:
            raise RequestError(request_id, f"grammar: {grammar.kind} is impossible: {matcher.problem}")
        if answered:
            matcher.replay(answered)
        # In this order: llguidance finds out that nothing can follow while it looks for what can.
        can_go_on = bool(allowed_tokens([matcher], self._vocab_size).any())
        if matcher.problem or not (can_go_on or matcher.complete):
            raise RequestError(request_id, f"grammar: {grammar.kind} allows no token here {matcher.problem}".rstrip())
        return matcher


def allowed_tokens(matchers: Sequence[Matcher], vocab_size: int) -> Tensor:
    """[S, V] bool: what each matcher lets follow. All false for a matcher that went wrong.

    Where the grammar leaves but one text, only the tokenizer's own first token of it is let through.
    """
    bits = llguidance.numpy.allocate_token_bitmask(len(matchers), vocab_size)
    bits[:] = 0
    for index, matcher in enumerate(matchers):
        if not matcher.problem:
            llguidance.numpy.fill_next_token_bitmask(matcher.inner, bits, index)
    words_SW1 = torch.from_numpy(bits)[:, :, None]
    return ((words_SW1 >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten(1)[:, :vocab_size]


def _json_schema(source: str) -> str:
    # Compact JSON: white space is where models that are forced into a form lose themselves.
    return llguidance.LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})


def _json_object(source: str) -> str:
    return _json_schema(json.dumps({"type": "object"}))


_SOURCES = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": llguidance.LLMatcher.grammar_from_regex,
    "lark": llguidance.LLMatcher.grammar_from_lark,
}
