"""What choosing the next token of one sequence needs to know of the tokens before it. V vocabulary.

Rebuilt from the tokens alone: a request that goes on in another process, or after a preemption, remembers the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from farspan.engine.detokenize import Detokenizer, StopStrings
from farspan.engine.grammar import GrammarCompiler, Matcher
from farspan.engine.request import Grammar, SamplingParams
from farspan.engine.words import BadWords, WordWatch, spell
from farspan.errors import RequestError

# Answers to one prompt, and lines of a batch, have the same words: they are spelled once.
_WORDS_KEPT = 8


@dataclass(slots=True)
class Counts:
    """Only for sequences with penalties: two numbers for each token of the vocabulary."""

    answered_V: Tensor
    """How often a token was answered."""
    seen_V: Tensor
    """Whether a token is in the prompt or the answer."""


class TextWatch:
    """Ends an answer at its stop strings, which may begin and end inside tokens."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._detokenizer, self._stops = detokenizer, stops

    def push(self, token: int, may_end: bool) -> bool:
        """Whether a stop string is complete with this token. What comes while nothing may end is not looked at."""
        text = self._detokenizer.push([token])
        if may_end:
            self._stops.push(text)
        return self._stops.stopped


@dataclass(frozen=True, slots=True)
class Allowed:
    """The only tokens that may be chosen."""

    tokens: frozenset[int]
    mask_V: Tensor
    """The same, as bool."""

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, are among them."""
        return next((place for place, token in enumerate(tokens) if token not in self.tokens), len(tokens))


@dataclass(slots=True)
class History:
    """What one sequence's next token depends on besides logits and chance, and its text so far.

    Each part is none where nothing asks for it.
    """

    counts: Counts | None
    matcher: Matcher | None
    text: TextWatch | None
    allowed: Allowed | None
    words: WordWatch | None

    @property
    def steers(self) -> bool:
        """Whether logits are changed by it."""
        return any(part is not None for part in (self.counts, self.matcher, self.allowed, self.words))

    def accept(self, token: int, may_end: bool) -> bool:
        """Remember a chosen token. Whether the answer ends with it: a stop string or the grammar is complete."""
        if self.counts is not None:
            self.counts.answered_V[token] += 1
            self.counts.seen_V[token] = True
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.words is not None:
            self.words.push(token)
        at_stop_string = self.text is not None and self.text.push(token, may_end)
        return at_stop_string or (self.matcher is not None and self.matcher.ended)

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, nothing here forbids to follow one after the other."""
        parts = (self.matcher, self.allowed, self.words)
        return min((part.fits(tokens) for part in parts if part is not None), default=len(tokens))


class Recall:
    """Makes histories for the requests of one engine."""

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device, tokenizer: Any = None
    ) -> None:
        self._vocab_size, self._eos_token_ids, self._device = vocab_size, eos_token_ids, device
        self._tokenizer = tokenizer
        self._compiler: GrammarCompiler | None = None
        self._spelled = lru_cache(maxsize=_WORDS_KEPT)(self._spell)

    def recall(
        self, request_id: str, params: SamplingParams, prompt: Sequence[int], answered: Sequence[int]
    ) -> History | None:
        """The history after `answered`; none when nothing asks for one.

        Raises RequestError when the grammar is impossible, or there is no tokenizer for what is asked.
        """
        counts = self._count(params, prompt, answered)
        matcher = self._match(request_id, params.grammar, answered) if params.grammar else None
        text = self._watch(request_id, params, answered) if params.stop else None
        allowed = self._allow(params.allowed_token_ids) if params.allowed_token_ids else None
        words = WordWatch(self._bad_words(request_id, params.bad_words), answered) if params.bad_words else None
        history = History(counts, matcher, text, allowed, words)
        return history if text is not None or history.steers else None

    def _count(self, params: SamplingParams, prompt: Sequence[int], answered: Sequence[int]) -> Counts | None:
        if params.repetition_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0:
            return None
        given = torch.tensor(answered, dtype=torch.long)
        answered_V = torch.bincount(given, minlength=self._vocab_size).int()
        seen_V = answered_V > 0
        seen_V[torch.tensor(prompt)] = True
        return Counts(answered_V.to(self._device), seen_V.to(self._device))

    def _match(self, request_id: str, grammar: Grammar, answered: Sequence[int]) -> Matcher:
        tokenizer = self._needed_tokenizer(request_id, "grammar")
        if self._compiler is None:
            try:
                self._compiler = GrammarCompiler(tokenizer, self._vocab_size, self._eos_token_ids)
            except ValueError as problem:
                raise RequestError(request_id, f"grammar: this model's tokenizer cannot be used: {problem}") from None
        return self._compiler.start(request_id, grammar, answered)

    def _watch(self, request_id: str, params: SamplingParams, answered: Sequence[int]) -> TextWatch:
        tokenizer = self._needed_tokenizer(request_id, "stop")
        text = TextWatch(Detokenizer(tokenizer), StopStrings(params.stop))
        for number, token in enumerate(answered, 1):
            text.push(token, number >= params.min_tokens)
        return text

    def _allow(self, tokens: frozenset[int]) -> Allowed:
        mask_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask_V[torch.tensor(sorted(tokens))] = True
        return Allowed(tokens, mask_V.to(self._device))

    def _bad_words(self, request_id: str, words: tuple[str, ...]) -> BadWords:
        self._needed_tokenizer(request_id, "bad_words")
        try:
            return self._spelled(words)
        except ValueError as problem:
            raise RequestError(request_id, str(problem)) from None

    def _spell(self, words: tuple[str, ...]) -> BadWords:
        return spell(self._tokenizer, words, self._vocab_size)

    def _needed_tokenizer(self, request_id: str, field: str) -> Any:
        if self._tokenizer is None:
            raise RequestError(request_id, f"{field}: needs text, and this engine was built without a tokenizer")
        return self._tokenizer
