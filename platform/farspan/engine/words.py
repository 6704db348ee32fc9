"""Words that an answer must not have, as the tokens they are written with.

A word is forbidden by its last token, where the answer ends with those before it. What is looked at is the answer
alone, not the prompt, and only the tokenizer's own spelling of a word, with a space before it and without: text that is
put together from other tokens is not found.
Source: bad_words of vLLM (https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any


class BadWords:
    """Which tokens would complete a word, after which others. Holds for any answer: it remembers none."""

    def __init__(self, spellings: Iterable[Sequence[int]]) -> None:
        """`spellings`: the tokens of each word, at least one."""
        self._ends: dict[tuple[int, ...], set[int]] = {}
        # The last token of a beginning -> how long such beginnings are: most answers end with none.
        self._sizes: dict[int, set[int]] = {}
        for spelling in spellings:
            beginning, last = tuple(spelling[:-1]), spelling[-1]
            self._ends.setdefault(beginning, set()).add(last)
            if beginning:
                self._sizes.setdefault(beginning[-1], set()).add(len(beginning))
        self.num_looked_at = max(map(len, self._ends), default=0)
        """No more of an answer matters than its last so many tokens."""

    def after(self, answered: Sequence[int]) -> set[int]:
        """The tokens that may not follow."""
        found = set(self._ends.get((), ()))
        for size in self._sizes.get(answered[-1], ()) if answered else ():
            if size <= len(answered):
                found |= self._ends.get(tuple(answered[-size:]), set())
        return found


def spell(tokenizer: Any, words: Sequence[str], vocab_size: int) -> BadWords:
    """Raises ValueError for a word that the tokenizer has no tokens for."""
    texts = [(index, text) for index, word in enumerate(words) for text in _variants(word)]
    # At once: one by one takes many times as long.
    spellings = tokenizer([text for _, text in texts], add_special_tokens=False)["input_ids"]
    known = {index for (index, _), spelling in zip(texts, spellings, strict=True) if spelling}
    lost = next((word for index, word in enumerate(words) if index not in known), None)
    if lost is not None:
        raise ValueError(f"bad_words must hold words that this model has tokens for, got {lost!r}; leave it out")
    # A tokenizer may know tokens that the model has no row for: those are never written.
    return BadWords(spelling for spelling in spellings if spelling and max(spelling) < vocab_size)


def _variants(word: str) -> tuple[str, ...]:
    bare = word.lstrip(" ")
    return (bare, f" {bare}") if bare else (word,)


class WordWatch:
    """How far one answer is in words that it must not have."""

    def __init__(self, words: BadWords, answered: Sequence[int] = ()) -> None:
        self._words, self._recent = words, deque(answered, maxlen=words.num_looked_at)

    def push(self, token: int) -> None:
        self._recent.append(token)

    @property
    def forbidden(self) -> set[int]:
        """The tokens that may not follow."""
        return self._words.after(list(self._recent))

    def fits(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, could follow one after the other."""
        before = list(self._recent)
        ahead = ([*before, *tokens[:place]] for place in range(len(tokens)))
        bad = (place for place, so_far in enumerate(ahead) if tokens[place] in self._words.after(so_far))
        return next(bad, len(tokens))
