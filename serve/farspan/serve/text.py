"""Bytes and text of single tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any


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
