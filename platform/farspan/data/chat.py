"""Conversations: the tokenizer's chat template writes them, and its spans say where the assistant speaks.

A template that marks them (`{% generation %}`) is believed. For any other, an assistant's turn is what the template
adds to the conversation before it: from the end of the generation prompt to the end of the turn. A template that
writes earlier turns differently once a later one is there has no such spans, and the conversation is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from farspan.data.tokenizer import TOKENIZER_FILE
from farspan.errors import ConfigError

TEMPLATE_REFUSED = "refused by the chat template"
TURNS_CHANGE = "rewritten by the chat template when the conversation goes on"
SPELLS_SPECIAL = "spells a special token"
NO_ASSISTANT = "the assistant says nothing"

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[dict[str, Any]]


class ChatEncoder:
    """Conversation -> token ids and the spans of them that are trained."""

    def __init__(self, folder: Path, template: str | None, train_on: str) -> None:
        """`template` overrides the tokenizer's own; `train_on` is assistant or all.

        Raises:
            ConfigError: there is no template, or it is not one.
        """
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = template or loaded.chat_template
        if not isinstance(found, str):
            raise ConfigError("chat_template", "must be given: the tokenizer has none", None, "name a Jinja file")
        self.template = found
        self._marked = _MARKED.search(found) is not None
        self._train_on = train_on
        self._special_tokens = loaded.special_tokens_map
        # Not the encoder of plain texts: here the template's own <|im_end|> must become one token.
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._specials = [token.content for token in added if token.special]
        try:
            self._render([{"role": "user", "content": "a"}], False)
        except _Refused as refused:
            # Some templates demand more of a conversation; what is no template at all fails on every one.
            logging.getLogger(__name__).info("the chat template refuses a lone user: %s", refused)

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray] | str:
        """(ids, spans_N2) of a conversation, or the reason why it cannot be learnt.

        ids are those of transformers' `apply_chat_template`; spans are [start, stop) in tokens.
        """
        if any(special in message["content"] for message in messages for special in self._specials):
            return SPELLS_SPECIAL
        try:
            text, turns = self._written(messages)
        except _Refused as refused:
            return refused.reason
        answer = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(answer.ids, dtype=np.uint32)
        if self._train_on == "all":
            return ids, np.array([[0, len(ids)]], dtype=np.uint32)
        spans_N2 = token_spans(answer.offsets, turns)
        return (ids, spans_N2) if len(spans_N2) else NO_ASSISTANT

    def _written(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and from which to which character the assistant speaks."""
        if self._train_on == "all":
            return self._render(messages, False)[0], []
        text, turns = self._render(messages, False, marks=self._marked)
        if self._marked:
            return text, turns
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._render(messages[:number], True)
                after, _ = self._render(messages[: number + 1], False)
                if not after.startswith(before) or not text.startswith(after):
                    raise _Refused(TURNS_CHANGE)
                turns.append((len(before), len(after)))
        return text, turns

    def _render(self, messages: Messages, prompt: bool, *, marks: bool = False) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, turns = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except TemplateError as problem:
            # A syntax error is the template's; anything else is what the template says of this conversation.
            if getattr(problem, "lineno", None) is not None:
                reason = " ".join(str(problem).split())
                raise ConfigError("chat_template", "must be a Jinja template", reason, "correct that line") from None
            raise _Refused(TEMPLATE_REFUSED) from None
        except (TypeError, KeyError, ValueError):
            raise _Refused(TEMPLATE_REFUSED) from None
        return texts[0], [(int(start), int(stop)) for start, stop in (turns[0] if marks else [])]


class _Refused(Exception):
    """This conversation cannot be written; never leaves the file."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def token_spans(offsets: Sequence[tuple[int, int]], turns: Sequence[tuple[int, int]]) -> np.ndarray:
    """spans_N2 of the tokens that hold a character of a turn; `offsets` are the characters of each token, rising."""
    if not offsets:
        return np.empty((0, 2), np.uint32)
    starts, stops = np.asarray(offsets, dtype=np.int64).T
    spans = []
    for first, last in turns:
        begin = int(np.searchsorted(stops, first, side="right"))
        end = int(np.searchsorted(starts, last, side="left"))
        if begin < end:
            spans.append((begin, end))
    return np.array(spans, dtype=np.uint32).reshape(-1, 2)
