"""The client's side of an endpoint on hosts: streams read beside each other, and what each request took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

_PATIENCE_S = 120.0


@dataclass
class Stream:
    """One greedy answer, read as it comes."""

    id: str = ""
    text: str = ""
    finish: str | None = None
    error: Exception | None = None
    arrivals_s: list[float] = field(default_factory=list)
    """When pieces came, by the monotonic clock."""

    def longest_gap_s(self) -> float:
        return max(after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))


@dataclass(frozen=True)
class Client:
    """Whoever asks from the switch, on which it is one more host."""

    url: str
    key: str
    model: str

    def is_ready(self) -> bool:
        """Whether the endpoint answers here."""
        try:
            return httpx.get(f"{self.url.removesuffix('/v1')}/ready", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def start(self, prompt: str, max_tokens: int) -> tuple[Stream, threading.Thread]:
        """A stream, and the thread that reads it."""
        stream = Stream()
        thread = threading.Thread(target=self._read, args=(stream, prompt, max_tokens), daemon=True)
        thread.start()
        return stream, thread

    def ask(self, prompt: str, max_tokens: int) -> Stream:
        """A whole answer."""
        stream, thread = self.start(prompt, max_tokens)
        thread.join(_PATIENCE_S)
        assert not thread.is_alive(), f"no end after {stream.text!r}"
        return stream

    def trace(self, stream: Stream) -> dict[str, Any]:
        answer = httpx.get(
            f"{self.url}/requests/{stream.id}/trace", headers={"Authorization": f"Bearer {self.key}"}, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def _read(self, stream: Stream, prompt: str, max_tokens: int) -> None:
        http = httpx.Client(trust_env=False, timeout=_PATIENCE_S)
        try:
            with openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, http_client=http) as client:
                asked = client.completions.create(
                    model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
                )
                for chunk in asked:
                    stream.id = chunk.id
                    stream.arrivals_s.append(time.monotonic())
                    stream.text += chunk.choices[0].text
                    stream.finish = chunk.choices[0].finish_reason or stream.finish
        except (openai.OpenAIError, httpx.HTTPError) as problem:
            stream.error = problem
