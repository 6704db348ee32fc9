"""The whole path as a user runs it: data, training, serving, client, report; and what is left after Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import uuid
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from tests.support.corpus import small_corpus
from tests.support.marked import FARSPAN, MARK, assert_nothing_is_left, interrupted
from tests.support.s3 import S3Bucket

from farspan.data.manifest import TOKENIZER_FOLDER
from farspan.models.checkpoint import load_tokenizer, make_config, random_causal_lm, save_causal_lm


@pytest.mark.long
def test_quickstart_trains_serves_and_proves_the_answers(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    answer = subprocess.run(
        [*FARSPAN, "quickstart", "--folder", "qs", "train.steps=3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=540, env={**os.environ, MARK: mark},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for command in ("$ farspan data build", "$ farspan train", "$ farspan serve"):
        assert command in answer.stdout
    assert "step     3/3" in answer.stdout
    assert "5 of 5 answers equal transformers' greedy generate" in answer.stdout
    assert "by nixl" in answer.stdout
    report = (tmp_path / "qs" / "run" / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(report)
    assert "<svg" in report
    key = (tmp_path / "qs" / "api_key").read_text().strip()
    assert key not in answer.stdout + answer.stderr + report
    assert_nothing_is_left(mark)


@pytest.mark.long
def test_ctrl_c_during_training_leaves_no_process(tmp_path: Path) -> None:
    interrupted(["quickstart", "--folder", "qs", "train.steps=1000"], tmp_path, "step     1/1000")


@pytest.fixture
def corpus_on_s3(s3: S3Bucket, tmp_path: Path) -> str:
    folder = Path(small_corpus(tmp_path))
    for file in folder.rglob("*"):
        if file.is_file():
            s3.put(f"corpus/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return f"{s3.uri}/corpus"


@pytest.fixture
def base_on_s3(s3: S3Bucket, corpus_on_s3: str, tmp_path: Path) -> str:
    tokenizer = load_tokenizer(tmp_path / "corpus" / TOKENIZER_FOLDER)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = make_config("llama", {**sizes, "vocab_size": len(tokenizer)})
    save_causal_lm(tmp_path / "base", config, random_causal_lm(config, 41).state_dict(), tokenizer)
    for file in (tmp_path / "base").iterdir():
        s3.put(f"base/{file.name}", file.read_bytes())
    s3.put("base/optimizer.pt", b"a pickle")
    return f"{s3.uri}/base"


@pytest.mark.long
def test_training_starts_from_reads_from_and_publishes_to_s3(
    s3: S3Bucket, corpus_on_s3: str, base_on_s3: str, tmp_path: Path
) -> None:
    # A step of this length changes no weight: what is published must be what training started from.
    (tmp_path / "run.yaml").write_text(
        f"model: {{source: '{base_on_s3}'}}\ndata: {{corpus: '{corpus_on_s3}', sequence_tokens: 64}}\n"
        "optim: {lr: 1.0e-30}\n"
        f"output: '{s3.uri}/run'\ntrain: {{steps: 2}}\nparallel: {{workers: 2, sp: 2}}\n"
    )
    (tmp_path / "home").mkdir()
    answer = subprocess.run(
        [*FARSPAN, "train", "run.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (copy,) = (tmp_path / "home" / ".cache" / "farspan" / "models").iterdir()
    assert not (copy / "optimizer.pt").exists()
    trained = load(s3.get("run/model/model.safetensors"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert trained.keys() == base.keys()
    assert all(torch.equal(trained[name], base[name]) for name in base)
    keys = s3.keys()
    assert "run/model/farspan_manifest.json" in keys
    assert "run/model/model.safetensors" in keys
    assert "run/checkpoints/step-00000002/farspan_manifest.json" in keys
    assert b'"kind":"run_finished"' in s3.get("run/events.jsonl")
    out = tmp_path / "model"
    exported = subprocess.run(
        [*FARSPAN, "export", f"{s3.uri}/run", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert exported.returncode == 0, exported.stderr
    assert (out / "model.safetensors").read_bytes() == s3.get("run/model/model.safetensors")
