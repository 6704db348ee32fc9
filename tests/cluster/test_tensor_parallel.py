"""An endpoint whose workers have two ranks each answers as transformers does, also when a rank is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from ray.util.state import list_actors
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig, TransferConfig
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.app import handle_for_threads, run_app
from farspan.serve.port import free_port

MAX_TOKENS = 24
LONG = 300


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    folder: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, timeout=180, max_retries=0)

    def answer(self, prompt: str, max_tokens: int) -> tuple[Any, dict[str, Any]]:
        """An answer, and what it took."""
        answer = self.client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0)
        trace = httpx.get(f"{self.url}/requests/{answer.id}/trace", headers={"Authorization": f"Bearer {self.key}"})
        return answer, trace.json()

    def text(self, prompt: str) -> str:
        return str(self.answer(prompt, MAX_TOKENS)[0].choices[0].text)

    def route(self, prompt: str) -> str:
        """How a request is answered now: split, when both workers are there."""
        told = self.answer(prompt, 2)[1]
        return "recovered" if told["recovered"] else str(told["route"])

    def expected(self, prompt: str, max_tokens: int = MAX_TOKENS) -> str:
        """Greedy text of transformers' own generate."""
        model, tokenizer = load_causal_lm(self.folder, torch.float64), load_tokenizer(self.folder)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def server(ray_cluster, tmp_path_factory) -> Iterator[Server]:
    folder, key_file = tmp_path_factory.mktemp("ranked") / "tiny", tmp_path_factory.mktemp("keys") / "keys"
    write_tiny_model(folder)
    key_file.touch(mode=0o600)
    key_file.write_text("sk-ranks\n")
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        api_key_file=str(key_file),
        prefill=RoleConfig(cpus=0.25),
        decode=RoleConfig(cpus=0.25),
        engine=EngineConfig(dtype="float64", kv_bytes=32 * 1024 * 1024, max_batch_tokens=512, tensor_parallel=2),
        # Each answer needs four ranks, and pages of two from two.
        transfer=TransferConfig(split="always"),
        start_timeout_s=180,
    )
    with run_app(config) as running:
        yield Server(running.url, "sk-ranks", folder)


def rank_pids() -> set[int]:
    """Processes of the ranks that follow, of all workers."""
    alive = list_actors(filters=[("class_name", "=", "Rank"), ("state", "=", "ALIVE")])
    return {actor.pid for actor in alive}


def wait_until(condition, timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.2)


@pytest.mark.soak
def test_workers_of_two_ranks_answer_as_transformers_does(server):
    assert len(rank_pids()) == 2
    handles = [handle_for_threads(name) for name in ("prefill", "decode")]
    infos = [handle.info.remote().result(timeout_s=60) for handle in handles]
    assert infos[0].layout == infos[1].layout
    asked = [TEXT[start : start + length] for start, length in ((100, 9), (2000, 3000), (500, 400), (7000, 60))]
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(server.text, asked))
    assert texts == [server.expected(prompt) for prompt in asked]
    # What was computed is found again, and says the same.
    answer, told = server.answer(asked[1], MAX_TOKENS)
    assert answer.choices[0].text == texts[1]
    assert (told["recovered"], told["transport"], told["route"]) == (False, "nixl", "split")
    page_bytes = 2 * 16 * 2 * (16 + 16) * 8
    assert told["kv_bytes"] == -(-answer.usage.prompt_tokens // 16) * page_bytes


@pytest.mark.soak
def test_a_rank_that_is_killed_takes_its_worker_along_and_no_client_notices(server):
    prompts = [TEXT[start : start + 700] for start in (3000, 5000)]
    expected = [server.expected(prompt, LONG) for prompt in prompts]
    before = rank_pids()

    def stream(prompt: str) -> Iterator[str]:
        chunks = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=LONG, temperature=0, stream=True
        )
        return (chunk.choices[0].text for chunk in chunks if chunk.choices)

    killed: set[int] = set()
    # Each worker in turn: whichever of them answers, one kill hits it.
    for victim in sorted(before):
        streams = [stream(prompt) for prompt in prompts]
        told = [next(each) for each in streams]
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
        told = [first + "".join(each) for first, each in zip(told, streams, strict=True)]
        assert told == expected
        # Until another worker is there in its place, and the ingress knows it.
        wait_until(lambda: len(rank_pids() - killed) == 2 and server.route(prompts[0]) == "split")
        assert server.text(prompts[0]) == server.expected(prompts[0])
