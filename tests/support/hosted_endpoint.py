"""An endpoint whose workers live on hosts, its client on another one, and what their answers are held against."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from tests.support.hosts import Host
from tests.support.ray_hosts import START_S, Process, RayHosts, wait_until
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.load import dump_config
from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig, TransferConfig
from farspan.models.checkpoint import load_causal_lm, load_tokenizer

KEY = "sk-of-the-tests"
PREFILL, DECODE = "farspan-prefill", "farspan-decode"
Generate = Callable[[str, int], str]
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


@dataclass
class Endpoint:
    """What runs, and how to ask it."""

    cluster: RayHosts
    driver: Process
    places: dict[str, list[str]]
    """Addresses of each deployment's replicas."""

    def host(self, address: str) -> Host:
        return next(host for host in self.cluster.made if host.address == address)

    def client(self, host: Host) -> Client:
        """Over the proxy of a host."""
        return Client(f"http://{host.address}:8000/v1", KEY, "tiny")


def start_endpoint(cluster: RayHosts, decoders: int, max_batch_tokens: int = 512) -> Endpoint:
    folder = cluster.folder / "tiny"
    write_tiny_model(folder)
    keys = cluster.folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(KEY + "\n", encoding="ascii")
    config = ServeConfig(
        model=str(folder),
        host="0.0.0.0",
        api_key_file=str(keys),
        prefill=RoleConfig(custom={PREFILL: 1}),
        decode=RoleConfig(replicas=decoders, custom={DECODE: 1}),
        engine=EngineConfig(dtype="float64", kv_bytes=64 * 1024 * 1024, max_batch_tokens=max_batch_tokens, threads=1),
        transfer=TransferConfig(split="always", colocate_below_tokens=64),
        start_timeout_s=180,
    )
    file = cluster.folder / "serve.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    driver = cluster.python(0, "-m", "tests.support.host_endpoint", str(file), log="endpoint.log")
    said = driver.wait_for("answers", 180).rpartition("answers ")[2].split()
    places = {name: where.split(",") for name, _, where in (word.partition("=") for word in said)}
    found = Endpoint(cluster, driver, places)
    # The head's proxy answers; those beside the workers come at their own time.
    wait_until(lambda: all(found.client(host).is_ready() for host in cluster.made), START_S, lambda: driver.text)
    return found


def plain_generate(folder: Path) -> Generate:
    """Greedy text of transformers' own generate, in this process."""
    write_tiny_model(folder)
    model, tokenizer = load_causal_lm(folder, torch.float64), load_tokenizer(folder)

    def generate(prompt: str, max_tokens: int) -> str:
        prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        tokens = out[0, prompt_ids.shape[1] :]
        assert len(set(tokens.tolist())) >= 6, f"a vacuous reference: {tokens}"
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return generate
