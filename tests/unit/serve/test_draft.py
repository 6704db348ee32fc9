"""An endpoint whose workers have a draft model answers as ever, says what came of guesses, and keeps no page of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.serve.in_process import Served
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.cli.main import run
from farspan.config.schema import EngineConfig, ServeConfig
from farspan.engine.draft_model import ModelDrafter
from farspan.errors import ConfigError, EngineError
from farspan.serve.app import check_app
from farspan.serve.port import free_port

PROMPTS = [TEXT[start : start + 160] for start in range(0, 900, 300)]


@pytest.fixture(scope="module")
def drafted(tiny_folder: Path) -> Iterator[Served]:
    made = Served(tiny_folder, engine={"draft_model": str(tiny_folder), "draft_tokens": 4})
    yield made
    made.stop()


def drafters(served: Served) -> list[ModelDrafter]:
    return [engine._guesses.drafter for engine in served.workers.engines]


def counted(served: Served) -> dict[str, float]:
    name = "farspan_draft_tokens_total"
    lines = [line for line in served.get("/metrics").text.splitlines() if line.startswith(name)]
    return {labels.removeprefix(name): float(value) for labels, _, value in (line.rpartition(" ") for line in lines)}


def test_text_equals_generate_and_every_guess_of_the_model_itself_is_counted_as_right(drafted, oracle):
    model, tokenizer = oracle
    assert counted(drafted) == {'{kind="proposed"}': 0, '{kind="accepted"}': 0}
    for prompt in PROMPTS:
        prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(prompt_ids, max_new_tokens=21, do_sample=False, pad_token_id=0)
        expected = out[0, prompt_ids.shape[1] :].tolist()
        assert len(set(expected)) >= 6

        async def ask(client, prompt=prompt):
            stream = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=21, temperature=0, stream=True
            )
            return "".join([event.choices[0].text async for event in stream if event.choices])

        assert drafted.ask(ask) == tokenizer.decode(expected, skip_special_tokens=True)
    # Prefill gives the first of 21 tokens; then each iteration gives one and 4 that were guessed.
    assert counted(drafted) == {'{kind="proposed"}': 48, '{kind="accepted"}': 48}
    assert counted(drafted)['{kind="proposed"}'] == 48
    # Nothing is held for requests that are over, in no pool.
    assert [drafter.num_held for drafter in drafters(drafted)] == [0, 0, 0]


def test_a_page_of_a_draft_model_that_is_held_for_nobody_is_found_in_a_worker_with_nothing_to_do(drafted):
    decode = drafted.workers.hosts[1]
    pool = drafters(drafted)[1].pool
    asyncio.run(decode.check_integrity())
    pages = pool.alloc(2, "a guess that was never over")
    with pytest.raises(EngineError, match=r"held for nobody who is here: page .* a guess that was never over"):
        asyncio.run(decode.check_integrity())
    pool.free(pages)
    asyncio.run(decode.check_integrity())


def test_a_draft_model_of_other_tokens_is_refused_before_ray_starts(tiny_folder, tmp_path):
    write_tiny_model(tmp_path / "other", vocab_size=380)
    config = ServeConfig(model=str(tiny_folder), port=free_port())
    config.engine = EngineConfig(draft_model=str(tmp_path / "other"), draft_tokens=2)
    with pytest.raises(ConfigError, match=r"engine.draft_model: must have the model's tokens, but token 380 is none"):
        check_app(config)
    config.engine.draft_model = str(tiny_folder)
    assert check_app(config) == tiny_folder


def test_a_typed_draft_model_is_a_folder_of_where_it_is_typed(tmp_path, monkeypatch, capsys):
    (tmp_path / "local.yaml").write_text("model: big\n")
    monkeypatch.chdir(tmp_path)
    assert run(["serve", "local.yaml", "engine.draft_model=small", "engine.draft_tokens=2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"  draft_model: {tmp_path / 'small'}\n" in printed
    assert f"model: {tmp_path / 'big'}\n" in printed
    assert run(["serve", "local.yaml", "engine.draft_model=s3://bucket/small", "--dry-run"]) == 2
    assert "engine.draft_model: needs engine.draft_tokens of at least 1" in capsys.readouterr().err
