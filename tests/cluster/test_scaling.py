"""The number of workers follows the load, and checkpoints are replaced, under streams of which none notices."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from ray import serve
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, ObjectivesConfig, RoleConfig, ScalingConfig, ServeConfig, TransferConfig
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.app import Running, run_app, update_app

MAX_TOKENS, NUM_STREAMS = 48, 2
PROMPTS = [TEXT[start : start + 300] for start in (100, 1100, 2100, 3100)]
NOBODY = RoleConfig(replicas=0, min_replicas=0, max_replicas=1, cpus=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("scaled") / "tiny"
    write_tiny_model(made)
    return made


def references(folder: Path) -> list[str]:
    """Greedy texts of transformers' own generate."""
    model, tokenizer = load_causal_lm(folder, torch.float64), load_tokenizer(folder)
    texts: list[str] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        )
        tokens = out[0, ids.shape[1] :].tolist()
        assert len(set(tokens)) >= 6, f"a vacuous reference: {tokens}"
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(texts)) == len(PROMPTS)
    return texts


@contextmanager
def served(
    folder: Path, keys: Path, decode: RoleConfig, listener: str = "proxy", **scaling: float
) -> Iterator[tuple[ServeConfig, Running]]:
    keys.touch(mode=0o600)
    keys.write_text("sk-test\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(
        model=str(folder),
        name="tiny",
        port=port,
        listener=listener,
        api_key_file=str(keys),
        prefill=NOBODY,
        decode=decode,
        engine=EngineConfig(dtype="float64", kv_bytes=16 * 1024 * 1024, max_batch_tokens=512),
        transfer=TransferConfig(deadline_s=5, lease_s=20),
        # Whatever load there is, a token takes longer: one worker more while anybody asks.
        objectives=ObjectivesConfig(token_s=1e-5),
        scaling=ScalingConfig(**{"up_s": 0.2, "down_s": 1.0, "to_zero_s": 1e6, "measure_s": 0.2, **scaling}),
        drain_s=60,
        start_timeout_s=120,
    )
    with run_app(config) as running:
        yield config, running


def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url, api_key="sk-test", timeout=120, max_retries=0)


@dataclass(frozen=True)
class Said:
    """What was answered to a prompt."""

    number: int
    text: str
    answer_id: str


def stream(asked: openai.OpenAI, number: int) -> Said:
    chunks = list(
        asked.completions.create(
            model="tiny", prompt=PROMPTS[number], max_tokens=MAX_TOKENS, temperature=0, stream=True
        )
    )
    return Said(number, "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), chunks[0].id)


def worker_of(running: Running, said: Said) -> str:
    """Who answered, by the request's trace."""
    headers = {"Authorization": "Bearer sk-test"}
    told = httpx.get(f"{running.url}/requests/{said.answer_id}/trace", headers=headers, timeout=30)
    return str(told.json()["decode_worker"])


@dataclass
class Load:
    """Streams one after the other, until told to stop; what each of them said."""

    running: Running
    said: list[Said]
    over: threading.Event

    def keep_asking(self, first: int) -> None:
        with client(self.running) as asked:
            for number in itertools.cycle(range(first, len(PROMPTS), NUM_STREAMS)):
                if self.over.is_set():
                    return
                self.said.append(stream(asked, number))


@contextmanager
def load(running: Running) -> Iterator[Load]:
    """Any stream that fails, fails the test. Few at a time: workers that start want the processors too."""
    made = Load(running, [], threading.Event())
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        asking = [pool.submit(made.keep_asking, number) for number in range(NUM_STREAMS)]
        try:
            yield made
        finally:
            made.over.set()
        for one in asking:
            one.result(timeout=120)


def num_running(deployment: str) -> int:
    states = serve.status().applications["farspan"].deployments[deployment].replica_states
    return states.get("RUNNING", 0)


def num_there(deployment: str) -> int:
    return sum(serve.status().applications["farspan"].deployments[deployment].replica_states.values())


def wait_until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


@pytest.mark.soak
def test_workers_come_with_the_load_and_go_with_it_and_no_stream_is_broken(ray_cluster, folder, tmp_path):
    expected = references(folder)
    decode = RoleConfig(replicas=1, min_replicas=1, max_replicas=2, cpus=0.5)
    with served(folder, tmp_path / "keys", decode) as (_, running):
        assert (num_running("decode"), num_there("prefill")) == (1, 0)
        with load(running) as streams:
            wait_until(lambda: num_running("decode") == 2)
            # The other one answers too now.
            first, before = worker_of(running, streams.said[0]), len(streams.said)
            wait_until(lambda: any(worker_of(running, said) != first for said in streams.said[before:][-4:]))
        # Those that are still given when one of the workers is told to go end where they are.
        wait_until(lambda: num_there("decode") == 1)
        with client(running) as asked:
            streams.said.append(stream(asked, 0))
        assert {said.text for said in streams.said if said.text != expected[said.number]} == set()
        assert {said.number for said in streams.said} == {0, 1, 2, 3}


@pytest.mark.soak
def test_workers_go_to_zero_and_the_next_request_brings_one_back(ray_cluster, folder, tmp_path):
    expected = references(folder)
    decode = RoleConfig(replicas=1, min_replicas=0, max_replicas=1, cpus=0.5)
    with served(folder, tmp_path / "keys", decode, to_zero_s=1.0) as (_, running), client(running) as asked:
        for _ in range(2):
            assert stream(asked, 1).text == expected[1]
            wait_until(lambda: num_there("decode") == 0)
            ready = httpx.get(f"{running.url.removesuffix('/v1')}/ready", timeout=30)
            assert (ready.status_code, ready.json()["status"]) == (200, "asleep")
            late = asked.with_options(timeout=60)
            with pytest.raises(openai.APIStatusError) as refused:
                late.completions.create(model="tiny", prompt="x", extra_body={"deadline_s": 0.2})
            assert refused.value.status_code == 504
            woken_s = time.monotonic()
            assert stream(asked, 2).text == expected[2]
            print(f"from no worker to a whole answer in {time.monotonic() - woken_s:.1f} s")


@pytest.mark.soak
@pytest.mark.parametrize("decode", [RoleConfig(cpus=0.5), RoleConfig(cpus=0.5, min_replicas=1, max_replicas=2)])
@pytest.mark.parametrize("listener", ["proxy", "ingress"])
def test_a_new_checkpoint_replaces_the_old_one_and_every_answer_is_of_one_of_them(
    ray_cluster, folder, tmp_path, decode, listener
):
    other = tmp_path / "other"
    write_tiny_model(other)
    model = load_causal_lm(other, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(other, safe_serialization=True)
    old, new = references(folder), references(other)
    assert all(before != after for before, after in zip(old, new, strict=True))
    with served(folder, tmp_path / "keys", decode, listener) as (config, running):
        with load(running) as streams:
            wait_until(lambda: len(streams.said) >= 8)
            update_app(running, replace(config, model=str(other)))
            wait_until(lambda: all(said.text == new[said.number] for said in streams.said[-4:]))
        mixed = [said.text for said in streams.said if said.text not in (old[said.number], new[said.number])]
        assert mixed == []
        with client(running) as asked:
            assert [stream(asked, number).text for number in range(4)] == new
