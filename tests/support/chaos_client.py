"""Clients that read every token of every choice of a stream, and when it came."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

# A stream that says nothing for so long is broken, for a client that asks again.
IMPATIENT_S = 10.0
_WHOLE_S = 180.0
_AGAIN_S = 0.2


@dataclass(frozen=True)
class Asked:
    """One request; `body` without the fields that all have."""

    kind: str
    body: dict[str, Any]


@dataclass
class Answer:
    """All choices of a request, as one stream told them."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    done: bool = False

    def take(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            index = choice["index"]
            self.tokens.setdefault(index, []).extend(choice["token_ids"])
            told = choice["logprobs"] or {"token_logprobs": []}
            self.logprobs.setdefault(index, []).extend(told["token_logprobs"])
            if choice["finish_reason"] is not None:
                assert index not in self.finish, "it ended twice"
                self.finish[index] = choice["finish_reason"]

    def begins(self, other: Answer) -> bool:
        """Whether everything that was told so far is what the other was told first."""
        return all(other.tokens[index][: len(tokens)] == tokens for index, tokens in self.tokens.items())


@dataclass
class Reading:
    """A client, reading in a thread of its own."""

    asked: Asked
    answers: list[Answer] = field(default_factory=list)
    """One for each time it asked."""
    arrivals_s: list[float] = field(default_factory=list)
    """When it asked first, and when pieces came."""
    id: str = ""
    problems: list[str] = field(default_factory=list)
    thread: threading.Thread = field(default_factory=threading.Thread)

    @property
    def num_pieces(self) -> int:
        return max(0, len(self.arrivals_s) - 1)

    @property
    def longest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))


@dataclass(frozen=True)
class Client:
    """`asks_again`: when its answer breaks off, from the beginning; what it was told before it throws away."""

    url: str
    key: str
    model: str
    asks_again: bool = False

    def start(self, asked: Asked, salt: str) -> Reading:
        reading = Reading(asked)
        reading.arrivals_s.append(time.monotonic())
        reading.thread = threading.Thread(target=self._read, args=(reading, salt), daemon=True)
        reading.thread.start()
        return reading

    def whole(self, reading: Reading) -> Answer:
        """The answer at its end."""
        reading.thread.join(_WHOLE_S)
        assert not reading.thread.is_alive(), f"{reading.asked.kind}: no end after {reading.num_pieces} pieces"
        assert reading.answers[-1].done, f"{reading.asked.kind}: {reading.problems}"
        return reading.answers[-1]

    def trace(self, reading: Reading) -> dict[str, Any]:
        """What its request took; nothing where the ingress that knew it is gone."""
        found = httpx.get(f"{self.url}/requests/{reading.id}/trace", headers=self._headers, trust_env=False, timeout=60)
        return found.json() if found.status_code == 200 else {}

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def _read(self, reading: Reading, salt: str) -> None:
        ends_s = time.monotonic() + _WHOLE_S - IMPATIENT_S
        while not self._attempt(reading, salt) and self.asks_again and time.monotonic() < ends_s:
            time.sleep(_AGAIN_S)

    def _attempt(self, reading: Reading, salt: str) -> bool:
        """Ask once; whether the answer is whole."""
        body = {"model": self.model, "stream": True, "return_token_ids": True, "ignore_eos": True, "cache_salt": salt}
        limits = httpx.Timeout(_WHOLE_S, read=IMPATIENT_S if self.asks_again else _WHOLE_S)
        answer = Answer()
        reading.answers.append(answer)
        try:
            with (
                httpx.Client(trust_env=False, timeout=limits, headers=self._headers) as http,
                http.stream("POST", f"{self.url}/completions", json={**body, **reading.asked.body}) as told,
            ):
                if told.status_code != 200:
                    reading.problems.append(f"{told.status_code}: {told.read().decode()[:200]}")
                    return False
                for line in told.iter_lines():
                    self._hear(reading, answer, line)
        except httpx.HTTPError as problem:
            reading.problems.append(f"{type(problem).__name__}: {problem}")
        return answer.done

    def _hear(self, reading: Reading, answer: Answer, line: str) -> None:
        if not line.startswith("data: "):
            return
        reading.arrivals_s.append(time.monotonic())
        if line == "data: [DONE]":
            answer.done = True
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            reading.problems.append(str(chunk["error"]))
            return
        reading.id = chunk["id"]
        answer.take(chunk)
