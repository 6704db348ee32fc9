"""Two models behind one address answer as transformers' generate does each, on workers of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import peft
import pytest
import torch
from ray import serve
from tests.support.double import DoublePrecision
from tests.support.local_ray import LocalRay
from tests.unit.engine.adapted import lora, save
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.serve.app import Running, run_app
from farspan.serve.port import free_port

# Two models' workers are started, which takes a busy machine longer than a test of every day may.
pytestmark = pytest.mark.soak

MAX_TOKENS = 16
PROMPTS = [TEXT[start : start + 200] for start in range(0, 1200, 300)]


@dataclass(frozen=True)
class Server:
    running: Running
    folders: dict[str, Path]
    law: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": "Bearer sk-first"}


@pytest.fixture(scope="module")
def server(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = tmp_path_factory.mktemp("several")
    folders = {name: made / name for name in ("tiny", "other")}
    for seed, folder in enumerate(folders.values(), start=3):
        write_tiny_model(folder, seed)
    with DoublePrecision():
        model = load_causal_lm(folders["other"], torch.float64)
        law = save(made / "law", model, lora(r=4, target_modules="all-linear"), 0)
    keys = made / "keys"
    keys.touch(mode=0o600)
    keys.write_text("sk-first\n")
    first = ServeConfig(
        model=str(folders["tiny"]),
        port=free_port(),
        listener="ingress",
        api_key_file=str(keys),
        prefill=RoleConfig(cpus=0.2),
        decode=RoleConfig(cpus=0.2),
        engine=EngineConfig(dtype="float64", kv_bytes=16 << 20, max_batch_tokens=512),
        start_timeout_s=240,
    )
    # The size of one of them may change: Serve builds the application by itself and asks our policy.
    second = replace(
        first,
        model=str(folders["other"]),
        decode=RoleConfig(cpus=0.2, max_replicas=2),
        # It is guessed for by the other model, which is wrong more often than not.
        engine=replace(first.engine, adapters={"law": law}, draft_model=str(folders["tiny"]), draft_tokens=2),
    )
    with run_app(first, second) as running:
        yield Server(running, folders, law)


def plain(server: Server, name: str) -> list[str]:
    """Greedy texts of transformers' own generate, or of peft's."""
    folder = server.folders.get(name, server.folders["other"])
    tokenizer = load_tokenizer(folder)
    with DoublePrecision():
        model = load_causal_lm(folder, torch.float64)
        if name not in server.folders:
            model = peft.PeftModel.from_pretrained(model, server.law).eval()
    texts = []
    for prompt in PROMPTS:
        prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=MAX_TOKENS,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        tokens = out[0, prompt_ids.shape[1] :].tolist()
        assert len(set(tokens)) >= 6, f"a vacuous reference: {tokens}"
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


def test_two_models_and_an_adapter_answer_side_by_side_as_transformers_computes_each(server: Server) -> None:
    names = ["tiny", "other", "law", "other:law"]

    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.running.url, api_key="sk-first", timeout=120, max_retries=0)
        calls = [
            client.completions.create(model=name, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
            for prompt in PROMPTS
            for name in names
        ]
        return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    want = {name: plain(server, name) for name in ("tiny", "other", "law")}
    want["other:law"] = want["law"]
    assert asyncio.run(ask()) == [want[name][number] for number in range(len(PROMPTS)) for name in names]
    assert len({text for texts in want.values() for text in texts}) == 3 * len(PROMPTS)


def test_every_model_is_listed_has_its_own_workers_and_a_name_nobody_has_is_not_found(server: Server) -> None:
    listed = httpx.get(f"{server.running.url}/models", headers=server.headers, timeout=60).json()["data"]
    assert [one["id"] for one in listed] == ["tiny", "other", "law"]
    asked = {"model": "neither", "prompt": "x", "max_tokens": 1}
    told = httpx.post(f"{server.running.url}/completions", json=asked, headers=server.headers, timeout=60)
    assert (told.status_code, told.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny', 'other', 'law' are" in told.json()["error"]["message"]
    deployed = serve.status().applications["farspan"].deployments
    assert set(deployed) == {"api", "prefill-tiny", "decode-tiny", "prefill-other", "decode-other"}
    assert server.running.model == "tiny, other"
