"""The text of one answer while its tokens come, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from farspan.engine.detokenize import StopStrings
from farspan.serve.messages import Tokens


class TextSource(Protocol):
    """A detokenizer."""

    def push(self, tokens: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Words:
    """What some tokens became: text that is certain, and where the text of each token begins."""

    text: str
    finish: str | None
    offsets: tuple[int, ...]


class AnswerText:
    """Ends an answer exactly where the engine does: before the first stop string, not looked for before min_tokens."""

    def __init__(self, detokenizer: TextSource, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer, self._stops, self._min_tokens = detokenizer, StopStrings(stops), min_tokens
        self._num_tokens = self._length = 0

    def push(self, batch: Tokens) -> Words:
        """The next tokens; those after a stop string are left out of `offsets`."""
        text, offsets = "", []
        for token in batch.tokens:
            offsets.append(self._length)
            self._num_tokens += 1
            text += self._kept(self._detokenizer.push([token]))
            if self._stops.stopped:
                return Words(text, "stop", tuple(offsets))
        if batch.finish is not None:
            text += self._kept(self._detokenizer.finish())
            text += self._stops.finish()
        return Words(text, "stop" if self._stops.stopped else batch.finish, tuple(offsets))

    def _kept(self, text: str) -> str:
        self._length += len(text)
        return text if self._num_tokens < self._min_tokens else self._stops.push(text)


class TokenNames:
    """Bytes and text of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, also where it is part of a character."""
        written = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        if written is None:
            return b""
        if token in self._special:
            return str(written).encode()
        if self._letters:
            return bytes(self._letters[letter] for letter in written if letter in self._letters)
        if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            return bytes([int(written[3:5], 16)])
        return str(written).replace("\u2581", " ").encode()

    def name_of(self, token: int) -> str:
        """Text, or OpenAI's way to write bytes that are no text of their own."""
        raw = self.bytes_of(token)
        try:
            return raw.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @cached_property
    def _letters(self) -> dict[str, int]:
        """The letters byte-level tokenizers write bytes with; empty for others."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return {}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
