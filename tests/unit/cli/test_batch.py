"""`farspan batch` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from tests.support.s3 import S3Bucket
from tests.unit.serve.tiny_folder import write_tiny_model
from transformers import AutoModelForCausalLM

from farspan.cli.main import run
from farspan.cli.progress import BatchProgressBar
from farspan.engine.offline import Progress


def test_a_file_is_answered_and_what_the_user_got_wrong_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prompts, output = tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_tiny_model(model)
    prompts.write_text('{"id": "a", "prompt": "import os"}\n{"id": "b"}\n')
    line = ["batch", str(prompts), "--model", str(model), "--output", str(output), "--max-tokens", "5"]
    settings = ["engine.dtype=float64", "engine.kv_bytes=4194304"]
    assert run([*line, *settings]) == 0
    assert "1 answers, 5 tokens" in capsys.readouterr().out
    answers = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert len(answers["a"]["tokens"]) == 5
    assert "exactly one of" in answers["b"]["error"]
    assert run([*line, *settings]) == 0
    assert "1 were there already; 1 lines have an error" in capsys.readouterr().out
    for wrong, reason in (
        ([*line, "engine.dtype=int8"], "engine.dtype: must be"),
        ([*line, "engine.page=3"], "did you mean"),
        ([*line, "--join"], "--join: must come with --engines"),
        ([*line[:-1], "6", *settings], "output: must hold answers of this model, these options and these prompts, but"),
        (["batch", str(prompts), "--model", str(model), "--output", str(prompts)], "must not be the file of prompts"),
        (["batch", str(prompts), "--model", str(model), "--output", "s3://bucket/out"], "must be a file on a disk"),
        (["batch", str(prompts), "--output", str(output)], "--model"),
    ):
        assert run(wrong) == 2
        assert reason in " ".join(capsys.readouterr().err.split())


def test_a_model_and_a_draft_model_on_s3_give_the_answers_of_the_local_folder(
    s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model, prompts = tmp_path / "model", tmp_path / "in.jsonl"
    write_tiny_model(model)
    for file in model.iterdir():
        s3.put(f"model/{file.name}", file.read_bytes())
    prompts.write_text('{"id": "a", "prompt": "import os"}\n{"id": "b", "prompt": "def f(x):"}\n')
    answers = []
    remote = f"{s3.uri}/model"
    for uri, more in ((str(model), []), (remote, [f"engine.draft_model={remote}", "engine.draft_tokens=3"])):
        output = tmp_path / f"out-{len(answers)}.jsonl"
        line = ["batch", str(prompts), "--model", uri, "--output", str(output), "--max-tokens", "12"]
        assert run([*line, "engine.dtype=float64", "engine.kv_bytes=4194304", *more]) == 0
        answers.append(sorted(output.read_text().splitlines()))
    assert answers[0] == answers[1]
    assert all(len(set(json.loads(line)["tokens"])) >= 6 for line in answers[0])


def test_a_draft_model_is_named_by_a_folder_relative_to_where_it_is_typed_and_changes_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(
        '{"id": "a", "prompt": "import os"}\n{"id": "b", "prompt": "def f(x):", "temperature": 1.0}\n'
        '{"id": "c", "tokens": [5, 6, 7], "temperature": 0.7, "top_k": 40}\n'
    )
    monkeypatch.chdir(tmp_path)
    line = ["batch", "in.jsonl", "--model", "model", "--max-tokens", "20", "engine.dtype=float64"]
    assert run([*line, "--output", "plain.jsonl", "engine.kv_bytes=4194304"]) == 0
    assert "guessed" not in capsys.readouterr().out
    drafted = [*line, "engine.draft_model=model", "engine.draft_tokens=4", "engine.kv_bytes=4194304"]
    assert run([*drafted, "--output", "drafted.jsonl"]) == 0
    told = re.search(r"3 answers, 60 tokens: .*; (\d+) of (\d+) guessed tokens were right", capsys.readouterr().out)
    assert told is not None
    # It is the model itself: of 5 tokens of an iteration 4 were guessed.
    assert int(told[1]) == int(told[2]) >= 3 * 15
    answers, plain = (sorted(Path(name).read_text().splitlines()) for name in ("drafted.jsonl", "plain.jsonl"))
    assert answers == plain
    assert len({token for record in map(json.loads, answers) for token in record["tokens"]}) >= 12
    # Answers are the same: a file goes on with or without guesses.
    assert run([*drafted, "--output", "plain.jsonl"]) == 0
    assert "3 were there already" in capsys.readouterr().out
    write_tiny_model(tmp_path / "other", vocab_size=380)
    for wrong, reason in (
        (["engine.draft_tokens=0"], "engine.draft_model: needs engine.draft_tokens of at least 1"),
        (["engine.draft_model=nowhere"], f"{tmp_path / 'nowhere'}: no such model folder"),
        (["engine.draft_model=other"], "engine.draft_model: must have the model's tokens, but token 380 is none"),
        (["engine.kv_bytes=4096"], "bytes are missing, got 4096; use at least engine.kv_bytes="),
        (["engine.tensor_parallel=2"], "engine.draft_model: does not go with engine.tensor_parallel=2"),
    ):
        assert run([*drafted, *wrong, "--output", "wrong.jsonl"]) != 0
        assert reason in " ".join(capsys.readouterr().err.split())


def test_adapters_are_named_on_the_command_line_by_folders_relative_to_where_it_is_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model")
    made = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "o_proj"]),
    )
    made.save_pretrained(str(tmp_path / "law"))
    (tmp_path / "in.jsonl").write_text(
        '{"id": "a", "tokens": [5, 6, 7], "adapter": "law"}\n{"id": "b", "tokens": [5, 6, 7]}\n'
        '{"id": "c", "tokens": [5, 6, 7], "adapter": "lav"}\n'
    )
    monkeypatch.chdir(tmp_path)
    line = ["batch", "in.jsonl", "--model", "model", "--output", "out.jsonl", "--max-tokens", "9"]
    settings = ["engine.dtype=float64", "engine.kv_bytes=4194304"]
    assert run([*line, *settings, "engine.adapters.law=law"]) == 0
    answers = {record["id"]: record for record in map(json.loads, Path("out.jsonl").read_text().splitlines())}
    assert answers["a"]["tokens"] != answers["b"]["tokens"]
    assert answers["c"]["error"] == "no adapter 'lav' is here; known: law"
    capsys.readouterr()
    with torch.no_grad():
        next(p for name, p in made.named_parameters() if "lora_B" in name).add_(1.0)
    made.save_pretrained(str(tmp_path / "law"))
    assert run([*line, *settings, "engine.adapters.law=law"]) == 2
    assert "'a' was asked with another model" in capsys.readouterr().err
    for wrong, reason in (("engine.adapters.x=nowhere", "no such folder"), ("engine.adapter_bytes=0", "at least 1")):
        assert run([*line, *settings, wrong]) != 0
        assert reason in " ".join(capsys.readouterr().err.split())


def test_off_a_terminal_a_line_every_few_seconds_says_how_far_a_batch_is(capsys: pytest.CaptureFixture[str]) -> None:
    now_s, progress = 100.0, Progress(total=1200, skipped=200)
    with BatchProgressBar(lambda: now_s) as bar:
        bar(progress)
        for _ in range(20):
            now_s += 1.0
            progress.answered, progress.tokens = progress.answered + 30, progress.tokens + 900
            progress.failed = 7
            bar(progress)
        (task,) = bar._bar.tasks
        assert (task.completed, task.total) == (807, 1200)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4
    assert told[0] == "357 of 1,200 lines, 7 failed, 200 were there already, 900 tokens/s"
    assert told[-1] == "807 of 1,200 lines, 7 failed, 200 were there already, 900 tokens/s"
