"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from farspan.engine.request import SamplingParams

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Deltas whose concatenation is exactly the tokenizer's text of all tokens, however those are bundled.

    Text that ends inside a character (the tokenizer shows a replacement character there) is held back until the
    rest has come. Each push decodes a window that begins at an earlier such clean end, not the whole answer. Only
    bytes that break off after a character of bytes, which some tokenizers then take back too, are shown behind it.
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
        if len(tokens) > 1 and (text := self._push_together(tokens)):
            return text
        return "".join(map(self._push_one, tokens))

    def finish(self) -> str:
        """What was held back: the answer ends here."""
        whole, emitted = self._decode(self._tokens), "".join(self._emitted)
        told = whole.startswith(emitted)
        self._emitted.append(whole[len(emitted) :] if told else self._decode(self._tokens[self._clean :]))
        return self._emitted[-1]

    def _push_together(self, tokens: Sequence[int]) -> str:
        """By two decodes; empty, and nothing done, where that may not be what they become one by one."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._clean])
        window = self._decode(self._tokens[self._start :])
        text = window.removeprefix(before)
        if text and window.startswith(before) and _REPLACEMENT not in text:
            return self._told(text)
        del self._tokens[-len(tokens) :]
        return ""

    def _push_one(self, token: int) -> str:
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._clean])
        window = self._decode(self._tokens[self._start :])
        text = window[len(before) :] if window.startswith(before) else self._decode(self._tokens[self._clean :])
        return "" if not text or text.endswith(_REPLACEMENT) else self._told(text)

    def _told(self, text: str) -> str:
        self._start, self._clean = self._clean, len(self._tokens)
        self._emitted.append(text)
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Ends a text before the first of some strings, or with it, wherever the deltas cut them.

    First is the one that is complete first; of two that end together, the one that begins first. Each character is
    looked at once for each stop string, however long they are.
    Source: Knuth, Morris, Pratt 1977, https://doi.org/10.1137/0206024.
    """

    def __init__(self, stops: Sequence[str], *, shown: bool = False) -> None:
        """`shown`: the text ends with the string."""
        self._searches = [_Search(stop) for stop in stops if stop]
        self._held, self._shown = "", shown
        self.found: str | None = None
        """The one that was complete first."""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, delta: str) -> str:
        """The part of the text that cannot belong to a stop string; sets `stopped` once one is complete."""
        if self.stopped:
            return ""
        if not self._searches:
            return delta
        text, before = self._held + delta, len(self._held)
        for end, letter in enumerate(delta, before + 1):
            found = [search.wanted for search in self._searches if search.feed(letter)]
            if found:
                self.found, self._held = max(found, key=len), ""
                return text[: end if self._shown else end - len(self.found)]
        kept = len(text) - max((search.matched for search in self._searches), default=0)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back in case a stop string would follow."""
        rest, self._held = self._held, ""
        return rest


class _Search:
    """One string looked for in a text that comes letter by letter."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.matched = 0
        """Length of the longest end of the text that begins the string."""
        # For each beginning of the string: the longest shorter beginning that also ends it.
        self._shorter = [0, 0]
        size = 0
        for letter in wanted[1:]:
            size = self._next(size, letter)
            self._shorter.append(size)

    def feed(self, letter: str) -> bool:
        """Whether the string is complete with this letter; nothing may be fed after that."""
        self.matched = self._next(self.matched, letter)
        return self.matched == len(self.wanted)

    def _next(self, size: int, letter: str) -> int:
        while size and self.wanted[size] != letter:
            size = self._shorter[size]
        return size + 1 if self.wanted[size] == letter else 0


class TextSource(Protocol):
    """A detokenizer."""

    def push(self, tokens: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Words:
    """What some tokens became: text that is certain."""

    text: str
    finish: str | None
    num_tokens: int
    """Of those that came, without what is after a stop string."""
    offsets: tuple[int, ...] = ()
    """Where the text of each of them begins in the answer, if that was asked for."""
    stop: str | None = None
    """The stop string that ended the answer."""


class AnswerText:
    """Ends an answer exactly where the engine does: at the first stop string, not looked for before min_tokens."""

    def __init__(
        self,
        detokenizer: TextSource,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        shows_stop: bool = False,
        by_token: bool = True,
    ) -> None:
        """`shows_stop`: the text ends with the stop string, not before it. `by_token`: `offsets` are wanted."""
        self._detokenizer, self._stops = detokenizer, StopStrings(stops, shown=shows_stop)
        self._min_tokens, self._by_token = min_tokens, by_token or bool(stops)
        self._num_tokens = self._length = 0

    def push(self, tokens: Sequence[int], finish: str | None) -> Words:
        """The next tokens, and how the answer ends with them; those after a stop string are left out."""
        text, offsets = "", []
        if not self._by_token:
            # At once: each time costs two decodes.
            text = self._detokenizer.push(tokens)
        for token in tokens if self._by_token else ():
            offsets.append(self._length)
            self._num_tokens += 1
            text += self._kept(self._detokenizer.push([token]))
            if self._stops.stopped:
                return Words(text, "stop", len(offsets), tuple(offsets), self._stops.found)
        if finish is not None:
            text += self._kept(self._detokenizer.finish())
            text += self._stops.finish()
        finish = "stop" if self._stops.stopped else finish
        return Words(text, finish, len(tokens), tuple(offsets), self._stops.found)

    def _kept(self, text: str) -> str:
        self._length += len(text)
        return text if self._num_tokens < self._min_tokens else self._stops.push(text)


def whole_text(tokenizer: Any, tokens: Sequence[int], finish: str, params: SamplingParams) -> tuple[str, str]:
    """(text, finish) of an answer whose tokens are all there: what its deltas would have added up to."""
    detokenizer = Detokenizer(tokenizer)
    if not params.stop:
        # In one go: token by token costs a decode each.
        return detokenizer.push(tokens) + detokenizer.finish(), finish
    text = AnswerText(detokenizer, params.stop, params.min_tokens, shows_stop=params.include_stop_str_in_output)
    words = text.push(tokens, finish)
    return words.text, words.finish or finish
