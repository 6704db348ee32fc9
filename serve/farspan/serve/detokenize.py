"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Deltas whose concatenation is exactly the tokenizer's text of all tokens.

    Text that ends inside a character (the tokenizer shows a replacement character there) is held back until the
    rest has come. Each push decodes a window that begins at the last such clean end, not the whole answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._emitted: list[str] = []
        # The window starts at `_start`; text of tokens before `_clean` has been emitted.
        self._start = 0
        self._clean = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that became certain with `tokens`; often empty."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._clean])
        window = self._decode(self._tokens[self._start :])
        if len(window) <= len(before) or window.endswith(_REPLACEMENT) or not window.startswith(before):
            return ""
        self._start, self._clean = self._clean, len(self._tokens)
        self._emitted.append(window[len(before) :])
        return self._emitted[-1]

    def finish(self) -> str:
        """What was held back: the answer ends here."""
        whole, emitted = self._decode(self._tokens), "".join(self._emitted)
        rest = whole[len(emitted) :] if whole.startswith(emitted) else ""
        self._emitted.append(rest)
        return rest

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Ends a text before the first of some strings, wherever the deltas cut them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, delta: str) -> str:
        """The part of the text that cannot belong to a stop string; sets `stopped` once one is complete."""
        if self.stopped:
            return ""
        text = self._held + delta
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back in case a stop string would follow."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
