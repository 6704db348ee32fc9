"""Several models behind one address: each answers as transformers computes it, by its own name and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tests.support.double import DoublePrecision
from tests.unit.engine.adapted import assert_greedy, lora, save
from tests.unit.serve.in_process import Served
from tests.unit.serve.test_autoscale import Context, told
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.cli.main import run
from farspan.cli.service import build_several
from farspan.config.load import parse_config
from farspan.config.schema import EngineConfig, RoleConfig, ServeConfig
from farspan.errors import ClusterError, ConfigError
from farspan.models.checkpoint import load_causal_lm
from farspan.serve.api import Api
from farspan.serve.keys import parse_key
from farspan.serve.limits import Limits
from farspan.serve.lineup import line_up
from farspan.serve.routes import route
from farspan.serve.several import Several
from farspan.serve.sizing import Sizing, as_metrics
from farspan.serve.worker import worker_threads

PROMPT = TEXT[200:500]
KEYS = (parse_key("sk-one", 1), parse_key("sk-two requests_per_minute=2", 2))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("several") / "other"
    write_tiny_model(made, seed=8)
    return made


@pytest.fixture(scope="module")
def law(other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with DoublePrecision():
        model = load_causal_lm(other_folder, torch.float64)
        return save(tmp_path_factory.mktemp("adapters") / "law", model, lora(r=4, target_modules="all-linear"), 0)


class TwoServed(Served):
    """`tiny`, and `other` with the adapter `law`, behind one address."""

    def __init__(self, folder: Path, other: Path, law: str) -> None:
        super().__init__(folder)
        self.second = Served(other, engine={"adapters": {"law": law}})
        limits = Limits(KEYS)
        self.apis = [
            Api(served.config, name, KEYS, served.workers, limits=limits)
            for served, name in ((self, "tiny"), (self.second, "other"))
        ]
        self.app = route(lambda: Several(self.apis))

    def stop(self) -> None:
        super().stop()
        self.second.stop()


@pytest.fixture(scope="module")
def both(tiny_folder: Path, other_folder: Path, law: str) -> Iterator[TwoServed]:
    made = TwoServed(tiny_folder, other_folder, law)
    yield made
    made.stop()


def body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **more}


def test_requests_of_all_names_at_once_are_each_answered_by_their_model(both, tiny_folder, other_folder, law, oracle):
    with DoublePrecision():
        other = load_causal_lm(other_folder, torch.float64)
        adapted = peft.PeftModel.from_pretrained(load_causal_lm(other_folder, torch.float64), law).eval()
    models = {"tiny": oracle[0], "other": other, "law": adapted, "other:law": adapted}

    async def ask(client: openai.AsyncOpenAI) -> list[list[int]]:
        calls = [
            client.completions.create(**body(name), extra_body={"return_token_ids": True, "ignore_eos": True})
            for name in models
            for _ in range(2)
        ]
        return [told.choices[0].token_ids for told in await asyncio.gather(*calls)]

    prompt, answers = oracle[1](PROMPT)["input_ids"], both.ask(ask)
    for name, tokens in zip([name for name in models for _ in range(2)], answers, strict=True):
        assert_greedy(models[name], prompt, tokens)
    assert len({tuple(tokens) for tokens in answers}) == 3


def test_the_list_names_every_model_and_adapter_also_while_workers_of_one_are_away(both, monkeypatch):
    async def listed(client: openai.AsyncOpenAI) -> list[tuple[str, str | None, int | None]]:
        found = [one async for one in client.models.list()]
        return [(one.id, getattr(one, "parent", None), getattr(one, "max_model_len", None)) for one in found]

    all_there = [("tiny", None, 8192), ("other", None, 8192), ("law", "other", 8192)]
    assert both.ask(listed) == all_there

    async def away() -> list[Any]:
        raise ClusterError("no worker answers")

    monkeypatch.setattr(both.second.workers, "info", away)
    monkeypatch.setattr(both.apis[1], "_info", None)
    assert both.ask(listed) == [all_there[0], ("other", None, None), ("law", "other", None)]
    told = both.get("/metrics")
    assert told.status_code == 200
    assert both.post("/v1/completions", body("tiny")).status_code == 200


def test_each_name_is_retrieved_as_it_is_listed_and_no_other(both):
    async def ask(client: openai.AsyncOpenAI) -> None:
        listed = {one.id: one async for one in client.models.list()}
        for name, other in (("tiny", "tiny"), ("other", "other"), ("law", "law"), ("other:law", "law")):
            found = await client.models.retrieve(name)
            assert found.model_dump() == {**listed[other].model_dump(), "id": name}
        for name in ("neither", "tiny:law", "other/law", "trace"):
            with pytest.raises(openai.NotFoundError) as refused:
                await client.models.retrieve(name)
            assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
            assert "'tiny', 'other', 'law' are" in refused.value.message

    both.ask(ask)
    assert both.get("/v1/models/law", key="no").status_code == 401


def test_it_is_ready_when_every_model_is(both, monkeypatch):
    told = both.get("/ready")
    assert (told.status_code, told.json()["status"]) == (200, "ready")
    assert {name: one["status"] for name, one in told.json()["models"].items()} == {"tiny": "ready", "other": "ready"}

    async def waiting() -> tuple[int, dict[str, Any]]:
        return 503, {"status": "waiting", "reason": "no worker answers"}

    monkeypatch.setattr(both.apis[1], "readiness", waiting)
    told = both.get("/ready")
    assert (told.status_code, told.json()["status"]) == (503, "waiting")
    assert told.json()["models"]["other"]["reason"] == "no worker answers"


@pytest.mark.parametrize("model", ["neither", "tiny:law", "law:other", ""])
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_name_nobody_has_is_not_found_and_those_there_are_are_named(both, url, model):
    words = {"/v1/completions": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}
    told = both.post(url, {"model": model, **words.get(url, {"messages": [{"role": "user", "content": "x"}]})})
    assert told.status_code == 404, told.text
    error = told.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
    assert "'tiny', 'other', 'law' are" in error["message"]


def test_a_question_that_one_model_would_answer_without_its_name_is_told_the_names(both, oracle):
    told = both.post("/tokenize", {"prompt": PROMPT})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "model")
    assert "must be one of 'tiny', 'other', 'law'" in told.json()["error"]["message"]
    named = both.post("/tokenize", {"model": "law", "prompt": PROMPT}).json()
    assert named["tokens"] == oracle[1](PROMPT)["input_ids"]
    assert both.post("/detokenize", {"model": "other", "tokens": named["tokens"]}).json() == {"prompt": PROMPT}


def test_what_a_key_may_use_holds_for_all_models_together(both):
    statuses = [
        both.post("/v1/completions", body(name), key="sk-two").status_code for name in ("tiny", "other", "tiny")
    ]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/requests/x/trace"])
def test_nobody_without_a_key_is_told_anything(both, path):
    assert both.get(path, key="sk-wrong").status_code == 401
    assert both.post("/v1/completions", body("tiny"), key="sk-wrong").status_code == 401


def test_a_request_is_traced_whichever_model_answered_it(both):
    for name in ("tiny", "law"):
        told = both.post("/v1/completions", body(name), headers={"x-request-id": f"asked-{name}"})
        assert told.status_code == 200, told.text
        assert both.get(f"/v1/requests/asked-{name}/trace").json()["output_tokens"] >= 6
    assert both.get("/v1/requests/asked-nobody/trace").status_code == 404


def test_numbers_are_told_for_each_model(both):
    def answered() -> dict[str, float]:
        families = text_string_to_metric_families(both.get("/metrics").text)
        (requests,) = (family for family in families if family.name == "farspan_requests")
        counts = dict.fromkeys(("tiny", "other"), 0.0)
        for sample in requests.samples:
            if sample.name.endswith("_total") and sample.labels["outcome"] == "answered":
                counts[sample.labels["model"]] = sample.value
        return counts

    before = answered()
    for name in ("tiny", "other", "law"):
        assert both.post("/v1/completions", body(name)).status_code == 200
    assert answered() == {"tiny": before["tiny"] + 1, "other": before["other"] + 2}
    text = both.get("/metrics").text
    assert text.count("# TYPE farspan_requests_total") == 1
    assert 'farspan_kv_pages{model="other",role="prefill",state="all"}' in text


def config(model: str, **more: Any) -> ServeConfig:
    return ServeConfig(model=model, api_key_file="/keys", **more)


def test_each_model_has_its_deployments_and_shares_the_machine_with_the_others():
    first = config("/m/a", decode=RoleConfig(replicas=1, max_replicas=3))
    second = config("s3://bucket/b", name="Org/b v2", engine=EngineConfig(adapters={"law": "/l"}))
    (alone,) = line_up([first])
    assert (alone.name, alone.label, alone.num_beside) == ("a", "", 0)
    places = line_up([first, second])
    assert [(place.name, place.label) for place in places] == [("a", "-a"), ("Org/b v2", "-Org-b-v2")]
    assert [place.num_beside for place in places] == [2, 4]
    # Six workers on twelve cores.
    assert [worker_threads(place.config, 12, place.num_beside) for place in places] == [2, 2]


@pytest.mark.parametrize(
    ("first", "second", "field", "reason"),
    [
        (config("/x/a"), config("/y/a"), "name", "'a' or its adapters.*set `name`"),
        (config("/a"), config("/b", engine=EngineConfig(adapters={"a": "/l"})), "name", "also use for model 'a'"),
        (config("/a", name="a:x"), config("/a", engine=EngineConfig(adapters={"x": "/l"})), "name", "got 'a:x'"),
        (config("/a", name="a b"), config("/b", name="a/b"), "name", "give one of them another name"),
        (config("/a"), config("/b", port=8001), "port", r"model 'a' has \(8000\).*got 8001; give port=VALUE for all"),
        (config("/a"), config("/b", host="::1"), "host", "shares an address"),
        (config("/a"), replace(config("/b"), api_key_file=None), "api_key_file", "shares an address"),
        (config("/a"), config("/b", max_body_bytes=1), "max_body_bytes", "shares an address"),
    ],
)
def test_models_that_cannot_share_an_address_are_refused(first, second, field, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        line_up([first, second])
    assert refused.value.field == field


def test_each_model_has_as_many_workers_as_its_own_clients_need():
    seen = {"-a": told(prompt_tokens_s=1700.0, answer_tokens_s=290.0), "-b": told(prompt_tokens_s=1.0)}
    raw: dict[str, Any] = {}
    for label, one in seen.items():
        for name, value in as_metrics(one, label).items():
            raw[name] = {"replica": [type("Point", (), {"value": value})]}

    def named(label: str) -> dict[str, Context]:
        return {f"prefill{label}": Context(f"prefill{label}"), f"decode{label}": Context(f"decode{label}")}

    contexts = {"api": Context("api", raw_metrics=raw), **named("-a"), **named("-b")}
    wanted, _ = Sizing({"-a": (2.0, 0.1), "-b": (2.0, 0.1)})(contexts)
    # As for a single model in test_autoscale.
    assert wanted == {"api": 1, "prefill-a": 3, "decode-a": 4, "prefill-b": 1, "decode-b": wanted["decode-b"]}
    assert wanted["decode-b"] < 4


def test_a_command_line_takes_a_config_for_each_model_and_what_is_typed_holds_for_all(tmp_path, capsys):
    for name in ("large", "small"):
        (tmp_path / f"{name}.yaml").write_text(f"model: /models/{name}\nport: 8001\n")
    files = [str(tmp_path / "large.yaml"), str(tmp_path / "small.yaml")]
    assert run(["serve", *files, "port=8002", "--dry-run"]) == 0
    told = [parse_config(ServeConfig, text) for text in capsys.readouterr().out.split("---\n")]
    assert [(one.model, one.port) for one in told] == [("/models/large", 8002), ("/models/small", 8002)]
    for wrong, reason in (
        (["serve", "port=8002", "--dry-run"], "CONFIG: must name a config file"),
        (["serve", *files, str(tmp_path / "none.yaml"), "--dry-run"], "none.yaml"),
        (["serve", *files, "prot=8002", "--dry-run"], "did you mean 'port'"),
    ):
        assert run(wrong) == 2
        assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"model": "/a"}, "must be a list of configs named models"),
        ({"models": []}, "must be a list of configs named models"),
        ({"models": [{"model": "/a"}, {"model": "/b"}]}, "api_key_file: must be given"),
        ({"models": [{"model": "/a", "prot": 1}]}, "did you mean 'port'"),
    ],
)
def test_a_config_file_of_ray_serve_that_names_several_models_is_checked_before_anything_starts(args, reason):
    with pytest.raises(ConfigError, match=reason):
        build_several(args)
