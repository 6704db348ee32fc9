"""`farspan chat`: an OpenAI client in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError

from farspan.cli.client import open_client
from farspan.errors import ClusterError, NotFoundError

_TIMEOUT_S = 600.0


def run_chat(url: str, api_key_file: str | None, prompt: str | None, max_tokens: int, temperature: float) -> None:
    """Stream answers to one prompt, or to each prompt that is typed until an empty line or Ctrl-D."""
    client = open_client(url, _read_key(api_key_file), _TIMEOUT_S)
    try:
        model = client.models.list().data[0]
        chats = bool((model.model_extra or {}).get("chat_template"))
        talk = _Talk(client, model.id, chats, max_tokens, temperature)
        for text in _prompts(prompt):
            for delta in talk.say(text):
                typer.echo(delta, nl=False)
            typer.echo()
    except APIConnectionError:
        raise ClusterError(f"no endpoint answers at {url}; start one with `farspan serve CONFIG`") from None
    except APIStatusError as problem:
        raise ClusterError(f"{url} answered {problem.status_code}: {problem.message}") from None
    except Exception as problem:
        # A stream that breaks off raises the HTTP library's own error, and openai has changed that library.
        if not isinstance(problem, OpenAIError) and not type(problem).__module__.startswith("httpx"):
            raise
        raise ClusterError(f"the answer of {url} broke off: {problem}") from None


class _Talk:
    """One conversation, or, without a chat template, one text after another."""

    def __init__(self, client: OpenAI, model: str, chats: bool, max_tokens: int, temperature: float) -> None:
        self._client, self._model, self._chats = client, model, chats
        self._max_tokens, self._temperature = max_tokens, temperature
        self._messages: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        if not self._chats:
            chunk: Any
            for chunk in self._client.completions.create(
                model=self._model,
                prompt=text,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                stream=True,
            ):
                yield chunk.choices[0].text if chunk.choices else ""
            return
        self._messages.append({"role": "user", "content": text})
        answer = ""
        part: Any
        for part in self._client.chat.completions.create(
            model=self._model,
            messages=self._messages,  # type: ignore[arg-type]
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            stream=True,
        ):
            delta = (part.choices[0].delta.content or "") if part.choices else ""
            answer += delta
            yield delta
        self._messages.append({"role": "assistant", "content": answer})


def _prompts(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if not sys.stdin.isatty():
        yield sys.stdin.read()
        return
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text:
            return
        yield text


def _read_key(path: str | None) -> str:
    if path is None:
        return "none"
    try:
        return Path(path).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        raise NotFoundError(path, "holds no key; `farspan serve` prints where it wrote one") from None
