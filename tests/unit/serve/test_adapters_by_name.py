"""A client names an adapter as its model, and gets what peft computes with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
from tests.support.double import DoublePrecision
from tests.unit.engine.adapted import assert_greedy, lora, save
from tests.unit.serve.in_process import Served, idle
from tests.unit.serve.placed import GuidedServed
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import TransferConfig
from farspan.engine.request import SamplingParams
from farspan.errors import ConfigError, TransferError
from farspan.models.checkpoint import load_causal_lm
from farspan.serve.messages import Caller, Failed, GenerationRequest, Prefilled
from farspan.serve.naming import ModelNames

PROMPT = TEXT[200:700]
NAMES = {"tiny": None, "law": "law", "tiny:law": "law", "poems": "poems", "tiny:poems": "poems"}
COLOCATED = TransferConfig(colocate_below_tokens=8192)


@pytest.fixture(scope="module")
def folders(tiny_folder, oracle, tmp_path_factory) -> dict[str, str]:
    made = tmp_path_factory.mktemp("adapters")
    configs = {"law": lora(r=4, lora_alpha=8, target_modules="all-linear"), "poems": lora(target_modules=["v_proj"])}
    with DoublePrecision():
        return {name: save(made / name, oracle[0], config, n) for n, (name, config) in enumerate(configs.items())}


@pytest.fixture(scope="module")
def opened(tiny_folder, folders, oracle) -> dict[str | None, Any]:
    """What peft opens for each adapter, and the model alone."""
    with DoublePrecision():
        found = {
            name: peft.PeftModel.from_pretrained(load_causal_lm(tiny_folder, oracle[0].dtype), folder).eval()
            for name, folder in folders.items()
        }
    return {None: oracle[0], **found}


@pytest.fixture(scope="module", params=["split", "colocated"])
def adapted(tiny_folder, folders, request) -> Iterator[Served]:
    more = {"transfer": COLOCATED} if request.param == "colocated" else {}
    made = Served(tiny_folder, engine={"adapters": folders}, **more)
    yield made
    made.stop()


def body(model: str, **more: Any) -> dict[str, Any]:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **more}


def answer(served: Served, model: str, **more: Any) -> tuple[list[int], int]:
    """(tokens, tokens of the prompt that were found computed)."""
    told = served.post("/v1/completions", body(model, **more))
    assert told.status_code == 200, told.text
    content = told.json()
    assert content["model"] == model
    return content["choices"][0]["token_ids"], content["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_answers_of_every_name_equal_peft_and_pages_are_found_again_only_by_the_same_adapter(adapted, opened, oracle):
    prompt = oracle[1](PROMPT)["input_ids"]
    answers, found = {}, {}
    for model, adapter in NAMES.items():
        answers[model], found[model] = answer(adapted, model)
        assert_greedy(opened[adapter], prompt, answers[model])
    assert len({tuple(tokens) for tokens in answers.values()}) == 3, "adapters without effect"
    # The first of each finds nothing of the others, though the prompt is the same.
    assert [found["tiny"], found["law"], found["poems"]] == [0, 0, 0]
    assert found["tiny:law"] == found["tiny:poems"] > 150


def test_requests_of_all_names_at_once_each_get_their_own_answer(adapted, opened, oracle):
    async def ask(client: openai.AsyncOpenAI) -> list[list[int]]:
        calls = [client.completions.create(**_for_openai(body(model))) for model in NAMES for _ in range(2)]
        return [told.choices[0].token_ids for told in await asyncio.gather(*calls)]

    prompt = oracle[1](PROMPT)["input_ids"]
    for model, tokens in zip([m for m in NAMES for _ in range(2)], adapted.ask(ask), strict=True):
        assert_greedy(opened[NAMES[model]], prompt, tokens)


def _for_openai(asked: dict[str, Any]) -> dict[str, Any]:
    ours = ("ignore_eos", "return_token_ids")
    return {**{k: v for k, v in asked.items() if k not in ours}, "extra_body": {k: asked[k] for k in ours}}


def test_an_answer_goes_on_with_its_adapter_when_its_worker_dies(adapted, opened, oracle):
    adapted.workers.die_after, adapted.workers.deaths = 7, 0
    try:
        tokens, _ = answer(adapted, "law", prompt=PROMPT[:300])
    finally:
        adapted.workers.die_after = None
    assert adapted.workers.deaths == 1
    assert_greedy(opened["law"], oracle[1](PROMPT[:300])["input_ids"], tokens)


@pytest.mark.parametrize("model", ["other", "tiny:", "tiny:other", "law:tiny", "law:law", "LAW", " law"])
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_name_nobody_has_is_not_found(adapted, url, model):
    words = {"/v1/completions": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}
    told = adapted.post(url, {"model": model, **words.get(url, {"messages": [{"role": "user", "content": "x"}]})})
    assert told.status_code == 404, told.text
    error = told.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
    assert "'law'" in error["message"]


def test_the_model_list_names_the_model_and_its_adapters(adapted):
    async def listed(client: openai.AsyncOpenAI) -> list[tuple[str, str | None]]:
        return [(one.id, getattr(one, "parent", None)) async for one in client.models.list()]

    assert adapted.ask(listed) == [("tiny", None), ("law", "tiny"), ("poems", "tiny")]


def test_pages_computed_with_one_adapter_are_never_decoded_with_another(adapted, opened, oracle):
    prefill, decode, _ = adapted.workers.hosts
    prompt = tuple(oracle[1](PROMPT[:100])["input_ids"])

    async def handed_over(first: str, second: str) -> Any:
        request = GenerationRequest("r", prompt, SamplingParams(max_tokens=3), Caller(adapter=first))
        prefilled = await prefill.prefill(request)
        assert isinstance(prefilled, Prefilled)
        assert prefilled.ticket is not None
        other = replace(request, caller=Caller(adapter=second))
        items = [item async for item in decode.stream(other, (prefilled.token,), prefilled.ticket)]
        await prefill.release(prefilled.ticket.ticket_id)
        return items[-1]

    async def all_pairs() -> None:
        for first in ("", "law", "poems"):
            for second in ("", "law", "poems"):
                last = await handed_over(first, second)
                assert isinstance(last, Failed) == (first != second), (first, second)
                if first != second:
                    assert isinstance(last.error, TransferError)
        assert all(idle(info) for info in await adapted.workers.info())

    asyncio.run(all_pairs())


def test_a_request_goes_to_the_worker_that_has_its_prompt_computed_with_the_same_adapter(tiny_folder, folders):
    guided = GuidedServed(tiny_folder, engine={"adapters": folders})
    try:
        first = {model: _routed(guided, model, f"{model}-first") for model in ("tiny", "law", "poems")}
        again = {model: _routed(guided, model, f"{model}-again") for model in first}
    finally:
        guided.stop()
    for model, trace in first.items():
        assert trace["cached_tokens"] == 0, "another adapter's pages"
        assert again[model]["decode_worker"] == trace["decode_worker"]
        assert again[model]["cached_tokens"] > 0.9 * trace["prompt_tokens"]
        assert f"{again[model]['cached_tokens'] // 4 * 4} prompt tokens found" in again[model]["route_reason"]


def _routed(guided: GuidedServed, model: str, name: str) -> dict[str, Any]:
    answered = guided.post("/v1/completions", body(model, prompt=TEXT[3000:4500]), headers={"x-request-id": name})
    assert answered.status_code == 200, answered.text
    trace: dict[str, Any] = guided.get(f"/v1/requests/{name}/trace").json()
    return trace


@pytest.mark.parametrize(("model", "adapters"), [("law", ["law"]), ("a", ["a:b"]), ("a", ["b", "a:b"])])
def test_names_that_would_mean_two_things_are_refused(model, adapters):
    if adapters == ["a:b"]:
        # Only one thing is called so.
        assert ModelNames(model, adapters).adapter("a:b") == "a:b"
        return
    with pytest.raises(ConfigError, match=r"engine\.adapters"):
        ModelNames(model, adapters)


def test_folders_of_adapters_are_relative_to_the_config_that_names_them(tmp_path, monkeypatch, capsys):
    from farspan.cli.serve import run_serve

    beside, here = tmp_path / "configs", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    (beside / "serve.yaml").write_text("engine:\n  adapters: {law: a/law, far: 's3://bucket/far', old: /old}\n")
    monkeypatch.chdir(here)
    run_serve(["../configs/serve.yaml"], ["model=m", "engine.adapters.typed=b/typed"], dry_run=True)
    told = capsys.readouterr().out
    for line in (f"law: {beside}/a/law", "far: s3://bucket/far", "old: /old", f"typed: {here}/b/typed"):
        assert line in told, told
    assert Path(f"{beside}/a/law").parts[-3:] == ("configs", "a", "law")
