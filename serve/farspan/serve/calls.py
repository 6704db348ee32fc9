"""What the text of a chat answer says: words, and calls of tools. Read while it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class CallDelta:
    """The next piece of a call; id and name come with the first one."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def report(self) -> dict[str, Any]:
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Said:
    """Words, then pieces of calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


def joined(*said: Said) -> Said:
    """What was said one after the other."""
    return Said("".join(one.text for one in said), tuple(call for one in said for call in one.calls))


class Reader(Protocol):
    """Takes the text of one answer piece by piece."""

    @property
    def over(self) -> bool:
        """Whether nothing that comes can be told any more: the answer may end here."""
        ...

    def push(self, text: str) -> Said: ...

    def finish(self) -> Said: ...


class PlainReader:
    """All text is words."""

    over = False

    def push(self, text: str) -> Said:
        return Said(text)

    def finish(self) -> Said:
        return Said()


def whole_calls(deltas: Iterable[CallDelta]) -> list[dict[str, Any]]:
    """The calls of a whole answer, put together."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.id is not None:
            calls[delta.index] = {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return list(calls.values())
