"""Calls that models write as JSON, read while they come: between Hermes' tags, or bare as Llama 3 writes them.

A call is an object with a name and arguments. Its arguments go on to the client as the model wrote them, as soon as
name and order of the object are plain; any other order is read at its end. What turns out not to be a call of an
offered tool is words.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from farspan.serve.calls import CallDelta, Said, joined

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# A name and what surrounds it; whoever writes more before the arguments is read at the end.
_LONGEST_HEAD = 1000


class TaggedReader:
    """Words, and calls between tags. `several`: or else it is over with the first whole call."""

    def __init__(self, names: frozenset[str], *, several: bool = True) -> None:
        self._names, self._several = names, several
        self.over = False
        self._held = ""
        self._call: _Call | None = None
        self._num_calls = 0

    def push(self, text: str) -> Said:
        """What is certain by now. White space beside calls is left out, so that before one it has to wait."""
        self._held += text
        said: list[Said] = []
        while not self.over and (step := self._read()) is not None:
            said.append(step)
        return joined(*said)

    def finish(self) -> Said:
        if self.over:
            return Said()
        rest, self._held = self._held, ""
        if self._call is not None:
            told, cut = self._call.cut()
            return told if told is not None else Said(HERMES_BEGIN + cut)
        return Said("" if self._num_calls and not rest.strip() else rest)

    def _read(self) -> Said | None:
        """The next step that can be taken; none: more text is needed."""
        if self._call is not None:
            return self._read_call(self._call)
        before, tag, after = self._held.partition(HERMES_BEGIN)
        if tag:
            self._held, self._call = after, _Call(self._num_calls, self._names)
            return Said(before.rstrip())
        kept = len(self._held) - _begun(self._held, HERMES_BEGIN)
        certain = self._held[:kept].rstrip()
        self._held = self._held[len(certain) :]
        return Said(certain) if certain else None

    def _read_call(self, call: _Call) -> Said | None:
        calls = call.push(self._held)
        self._held = ""
        if not call.ends_with(HERMES_END):
            return Said(calls=calls) if calls else None
        self._held, self._call = call.after(HERMES_END), None
        told, cut = call.end(HERMES_END)
        if told is None:
            return Said(HERMES_BEGIN + cut + HERMES_END)
        self._num_calls += 1
        self.over = not self._several
        return Said(calls=calls + told.calls)


class BareReader:
    """An answer that begins with a brace is calls, one after the other with semicolons between; any other is words.

    `several`: or else it is over with the first whole call.
    """

    def __init__(self, names: frozenset[str], *, several: bool = True) -> None:
        self._names, self._several = names, several
        self.over = False
        self._begun = ""
        self._call: _Call | None = None
        self._num_calls = 0
        self._words = False

    def push(self, text: str) -> Said:
        if self.over:
            return Said()
        if self._words:
            return Said(text)
        if self._call is None:
            self._begun += text
            start = self._begun.lstrip(" \t\r\n;" if self._num_calls else None)
            if not start:
                return Said()
            if not start.startswith("{"):
                words, self._begun, self._words = self._begun, "", True
                return Said(words)
            self._call, self._begun, text = _Call(self._num_calls, self._names), "", start
        calls = self._call.push(text)
        if not self._call.over:
            return Said(calls=calls)
        rest = self._call.rest
        self._call, self._num_calls, self.over = None, self._num_calls + 1, not self._several
        return joined(Said(calls=calls), self.push(rest))

    def finish(self) -> Said:
        if self._call is None:
            return Said("" if self._num_calls else self._begun)
        told, cut = self._call.cut()
        return told if told is not None else Said(cut)


class _Call:
    """One object while it comes. `over` with its last brace; `rest` is what came after that."""

    def __init__(self, index: int, names: frozenset[str]) -> None:
        self._index, self._names = index, names
        self._raw = ""
        self._named = False
        self._scan = _Braces()
        self._outer = _Braces(depth=1)
        self.over = False
        self.rest = ""

    def push(self, text: str) -> tuple[CallDelta, ...]:
        self._raw += text
        if self._named:
            return self._go_on(text)
        match = _HEAD.match(self._raw) if len(self._raw) <= _LONGEST_HEAD + len(text) else None
        name = _unquoted(match[1]) if match else None
        if match is None or name not in self._names:
            return ()
        self._named = True
        first = CallDelta(self._index, "", _new_id(), name)
        more = self._go_on(self._raw[match.end() :])
        return (CallDelta(self._index, "".join(delta.arguments for delta in more), first.id, name),)

    def ends_with(self, tag: str) -> bool:
        """Whether the tag has come: after the object where it is read as it comes, anywhere otherwise."""
        return tag in (self.rest if self._named else self._raw)

    def after(self, tag: str) -> str:
        return (self.rest if self._named else self._raw).partition(tag)[2]

    def end(self, tag: str) -> tuple[Said | None, str]:
        """What is told at the tag, and the text before it; nothing is told where that is no call."""
        if self._named:
            return Said(), ""
        inside = self._raw.partition(tag)[0]
        return self._whole(inside), inside

    def cut(self) -> tuple[Said | None, str]:
        """The same where the answer ends inside the call."""
        return (Said(), "") if self._named else (self._whole(self._raw), self._raw)

    def _go_on(self, text: str) -> tuple[CallDelta, ...]:
        kept = self._scan.feed(text)
        if self._scan.closed and not self.over:
            used = kept + self._outer.feed(text[kept:])
            self.over = self._outer.closed
            self.rest = text[used:] if self.over else ""
        elif self.over:
            self.rest += text
        return (CallDelta(self._index, text[:kept]),) if kept else ()

    def _whole(self, inside: str) -> Said | None:
        try:
            found: Any = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("name") not in self._names:
            return None
        arguments = found.get("arguments", found.get("parameters"))
        told = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return Said(calls=(CallDelta(self._index, told, _new_id(), str(found["name"])),))


class _Braces:
    """Finds where a JSON object ends."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_text, self._escaped = depth, False, False
        self.closed = False

    def feed(self, text: str) -> int:
        """How many letters belong to the object."""
        if self.closed:
            return 0
        for place, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return place + 1
        return len(text)


def _begun(text: str, tag: str) -> int:
    """Length of the longest end of a text that begins a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _unquoted(text: str) -> str | None:
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
