"""A line of a batch is answered with the words HTTP answers the same fields with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.serve.in_process import ENGINE

from farspan.config.schema import EngineConfig
from farspan.engine.offline import OfflineEngine, run_offline
from farspan.engine.request import SamplingParams

PROMPT = {"prompt": "import threading", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def offline(tiny_folder: Path) -> OfflineEngine:
    return OfflineEngine.open(tiny_folder, EngineConfig(**ENGINE))


def test_stop_strings_forms_bias_and_seeds_give_the_text_of_http(served, offline, tmp_path):
    def over_http(**fields: object) -> tuple[str, str]:
        response = served.post("/v1/completions", {"model": "tiny", **PROMPT, **fields})
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    whole, finish = over_http()
    assert finish == "length"
    stop = whole[6:9]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    asked = {
        "plain": {},
        "stop": {"stop": [stop]},
        "one stop": {"stop": stop},
        "late": {"stop": [stop], "min_tokens": 20},
        "shown": {"stop": [stop], "include_stop_str_in_output": True},
        "allowed": {"allowed_token_ids": [40, 41, 42, 43], "temperature": 1.5, "seed": 1},
        "bad": {"bad_words": [whole[4:7], whole[6:9], " "], "ignore_eos": True},
        "null": {"bad_words": None, "allowed_token_ids": None, "stop": None, "seed": None, "min_tokens": None},
        "compact": {
            "structured_outputs": {"json": {"const": [1]}, "disable_any_whitespace": True, "disable_fallback": True}
        },
        "many": {"stop": ["never", whole[12:14], whole[9:16]]},
        "object": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        "words": {"structured_outputs": {"choice": ["yes", "no"]}},
        "regex": {"structured_outputs": {"regex": "[a-c]{3}"}},
        "bias": {"logit_bias": {"40": 100}, "stop_token_ids": [40], "min_tokens": 3},
        "seed": {"seed": 5, "temperature": 1.0},
        "no end": {"ignore_eos": True, "temperature": 1.5, "seed": 2, "top_k": 40},
    }
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, **PROMPT, **fields}) + "\n" for name, fields in asked.items()))
    run_offline(offline, prompts, output, SamplingParams(), lambda _: None)
    answers = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    told = {name: (answers[name].get("text"), answers[name].get("finish")) for name in asked}
    assert told == {name: over_http(**fields) for name, fields in asked.items()}
    assert told["stop"] == told["one stop"] == (whole[: whole.index(stop)], "stop")
    assert told["shown"] == (told["stop"][0] + stop, "stop")
    assert told["bad"][0] != whole
    assert set(answers["allowed"]["tokens"]) <= {40, 41, 42, 43}
    assert told["null"] == told["plain"]
    assert told["compact"][0] == "[1]"
    assert len(told["late"][0]) > len(told["stop"][0])
    assert json.loads(told["object"][0])["a"] in (1, 2)
    assert told["words"][0] in ("yes", "no")
