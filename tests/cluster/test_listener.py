"""An endpoint whose ingress listens itself answers as one behind Serve's proxy does, and none runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from ray.util.state import list_actors
from tests.support.local_ray import LocalRay
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.app import Running, handle_for_threads, run_app
from farspan.serve.messages import WorkerInfo
from farspan.serve.port import free_port

MAX_TOKENS = 24
# One second is what is promised; the rest is for asking two workers how they are, on a machine that does other things.
FREED_S = 3.0


@dataclass(frozen=True)
class Server:
    running: Running
    folder: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.running.url, api_key="sk-first", timeout=120, max_retries=0)

    def infos(self) -> list[WorkerInfo]:
        return [handle_for_threads(name).info.remote().result(timeout_s=60) for name in ("prefill", "decode")]

    def is_idle(self) -> bool:
        return all(info.num_requests == 0 and info.num_free == info.num_pages for info in self.infos())


@pytest.fixture(scope="module")
def server(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_tiny_model(folder)
    keys = folder.parent / "keys"
    keys.touch(mode=0o600)
    keys.write_text("sk-first\n")
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        listener="ingress",
        api_key_file=str(keys),
        engine=EngineConfig(dtype="float64", kv_bytes=64 * 1024 * 1024, max_batch_tokens=512),
        transfer=TransferConfig(split="always"),
        start_timeout_s=120,
    )
    with run_app(config) as running:
        yield Server(running, folder)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_streamed_greedy_text_equals_generate_and_no_proxy_runs(server: Server, ray_cluster: LocalRay) -> None:
    prompt = TEXT[100:400]
    model, tokenizer = load_causal_lm(server.folder, torch.float64), load_tokenizer(server.folder)
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(prompt_ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
    assert len(set(out[0, prompt_ids.shape[1] :].tolist())) >= 6, "a vacuous reference"
    expected = tokenizer.decode(out[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    stream = server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    alive = list_actors(ray_cluster.dashboard, filters=[("state", "=", "ALIVE")], timeout=30)
    assert [actor.class_name for actor in alive if "Proxy" in actor.class_name] == []


def test_an_answer_is_found_by_the_name_it_came_with(server: Server) -> None:
    asked = {"model": "tiny", "prompt": "import", "max_tokens": 4}
    headers = {"Authorization": "Bearer sk-first"}
    told = httpx.post(f"{server.running.url}/completions", json=asked, headers=headers, timeout=60)
    name = told.headers["x-request-id"]
    assert told.json()["id"].endswith(name)
    trace = httpx.get(f"{server.running.url}/requests/{name}/trace", headers=headers, timeout=60)
    assert trace.json()["output_tokens"] == told.json()["usage"]["completion_tokens"]


def test_a_client_that_goes_away_frees_its_pages_within_a_second(server: Server) -> None:
    asked = {"model": "tiny", "prompt": TEXT[:600], "max_tokens": 6000, "ignore_eos": True}
    url, headers = f"{server.running.url}/completions", {"Authorization": "Bearer sk-first"}
    with httpx.stream("POST", url, json={**asked, "stream": True}, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        wait_until(lambda: not server.is_idle())
    wait_until(server.is_idle, FREED_S)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=asked, headers={**headers, "x-request-id": "left"}, timeout=httpx.Timeout(60, read=1.5))
    wait_until(server.is_idle, FREED_S)
    left = httpx.get(f"{server.running.url}/requests/left/trace", headers=headers, timeout=60).json()
    assert left["output_tokens"] > 0


def test_strangers_are_refused_and_errors_have_openais_shape(server: Server) -> None:
    stranger = server.client.with_options(api_key="sk-no")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="x")
    too_large = {"model": "tiny", "prompt": "x" * 9_000_000}
    headers = {"Authorization": "Bearer sk-first"}
    refused = httpx.post(f"{server.running.url}/completions", json=too_large, headers=headers, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
