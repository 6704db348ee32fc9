"""What a user gets wrong is answered in one sentence with exit code 2, and never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY, small_corpus
from tests.support.s3 import S3Bucket

import farspan.verify.doctor
from farspan.cli.doctor import run_doctor
from farspan.cli.main import run
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import ModelError
from farspan.train.build import named_parallel
from farspan.verify.probe import Subject

TRAIN = str(REPOSITORY / "jobs" / "configs" / "quickstart.yaml")
SERVE = str(REPOSITORY / "serve" / "configs" / "serve_quickstart.yaml")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("cli"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a command that ends with exit code 2."""
    assert run(list(arguments)) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    return message.removeprefix("error: ")


def test_the_doctor_examines_the_layout_that_the_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[Subject] = []

    def instead(subject: Subject) -> None:
        examined.append(subject)
        raise ModelError("enough was seen")

    monkeypatch.setattr(farspan.verify.doctor, "examine", instead)
    # Six heads over four processes would be a hybrid, but chunks are shared by exchanging heads.
    heads = ["model.settings.num_attention_heads=6", "model.settings.head_dim=8", "model.settings.hidden_size=48"]
    words = ["parallel.strategy=auto", "parallel.sp=4", "memory.chunk=seco", "memory.chunk_tokens=64", *heads]
    with pytest.raises(ModelError, match="enough was seen"):
        run_doctor("llama", words, as_json=False, certificate=None)
    config = load_config(
        RunConfig, None, ["data.corpus=none", "parallel.workers=4", "model.architecture=llama", *words]
    )
    taken = named_parallel(config, examined[0].config, 4)
    assert (examined[0].parallel.strategy, examined[0].parallel.ulysses) == (taken.strategy, taken.ulysses)


def test_what_is_changed_in_one_loaded_config_is_not_in_the_next() -> None:
    first = load_config(RunConfig, None, ["data.corpus=c"])
    first.model.settings["hidden_size"] = 8
    first.train.steps += 1
    second = load_config(RunConfig, None, ["data.corpus=c"])
    assert second.model.settings == {}
    assert second.train.steps == first.train.steps - 1


def test_a_missing_config_file_names_the_nearest_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("seed: 1\n")
    message = refused(capsys, "train", str(tmp_path / "trian.yaml"))
    assert message == f"{tmp_path / 'trian.yaml'}: no such config file; did you mean '{tmp_path / 'train.yaml'}'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.ps=2", "parallel.ps: is not a known key, got 2; did you mean 'sp'?"),
        ("train.steps=many", "train.steps: must be int, got 'many'; write train.steps=<int>"),
        ("parallel.sp=3", "parallel.sp: must divide parallel.workers (2), got 3; use parallel.sp=2"),
        ("model.dtype=bf16", "model.dtype: must be one of auto, bfloat16, float32, float64, got 'bf16'; "),
        ("optim.lr=0", "optim.lr: must be more than 0, got 0.0; use for example optim.lr=1"),
        ("optim.final_lr_fraction=-1", "optim.final_lr_fraction: must lie in 0..1, got -1.0; use "),
        ("optim.beta1=2", "optim.beta1: must lie in 0..0.999999, got 2.0; use optim.beta1=0.999999"),
        ("seed=-1", "seed: must lie in 0..9.22337e+18, got -1; use seed=0"),
        ("optim.lr=inf", "optim.lr: must lie in 0..1000, got inf; use optim.lr=1000"),
        ("train", "train: an override is written key=value, got 'train'; write train=VALUE"),
        ("model=3", "model: is a section, got 3; set one of its keys, for example model.source"),
        (
            "model.settings.hidden_siz=8",
            "model.settings.hidden_siz: is not a field of LlamaConfig, got 8; did you mean",
        ),
        (
            "model.architecture=lama",
            "model.architecture: must be a model_type of transformers, got 'lama'; did you mean",
        ),
    ],
)
def test_a_wrong_override_is_answered_with_field_rule_value_and_way_out(
    capsys: pytest.CaptureFixture[str], corpus: str, override: str, message: str
) -> None:
    assert refused(capsys, "train", TRAIN, f"data.corpus={corpus}", override, "--dry-run").startswith(message)


def test_a_sequence_that_stripes_do_not_divide_names_the_nearest_legal_length(
    capsys: pytest.CaptureFixture[str], corpus: str
) -> None:
    shape = ["parallel.workers=4", "parallel.sp=4", "parallel.strategy=ring", "data.sequence_tokens=1004"]
    message = refused(capsys, "train", TRAIN, f"data.corpus={corpus}", *shape)
    assert message.startswith("data.sequence_tokens: must be divisible by 8 for a zigzag over 4 ranks, got 1004; ")
    assert message.endswith("use data.sequence_tokens=1008 or parallel.layout=document_zigzag")


def test_a_corpus_that_is_not_there_names_the_command_that_builds_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(capsys, "plan", TRAIN, f"data.corpus={tmp_path / 'none'}")
    assert (
        message == f"{tmp_path / 'none'}: no corpus is there; run `farspan data build` with output={tmp_path / 'none'}"
    )


def test_an_unreadable_bucket_is_one_sentence(capsys: pytest.CaptureFixture[str], s3: S3Bucket) -> None:
    s3.put("corpus/farspan_manifest.json", b"{}")
    s3.deny("s3:GetObject", "s3:ListBucket")
    assert run(["plan", TRAIN, f"data.corpus={s3.uri}/corpus"]) == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert message.startswith(f"error: {s3.uri}/corpus: ")
    assert "denied" in message or "403" in message


def test_a_model_folder_without_weights_is_refused_before_ray_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    started = time.monotonic()
    message = refused(capsys, "serve", SERVE, f"model={tmp_path / 'model'}")
    assert (
        message == f"{tmp_path / 'model'}: has no weights; expected model.safetensors or model.safetensors.index.json"
    )
    assert time.monotonic() - started < 30
    assert "has no weights" in refused(capsys, "export", str(tmp_path / "model"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_never_opened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    message = refused(capsys, "serve", SERVE, f"model={tmp_path}")
    assert "has only pickled weights (pytorch_model.bin), which are never opened" in message


def test_unknown_verbs_and_options_are_answered_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'trian'" in refused(capsys, "trian")
    assert "No such option: --fats" in refused(capsys, "train", TRAIN, "--fats")


def test_quickstart_deletes_nobody_elses_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    message = refused(capsys, "quickstart", "--folder", str(tmp_path))
    assert message.startswith("--folder: must be new or hold an earlier quickstart")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_dry_run_prints_the_resolved_config_and_the_plan(capsys: pytest.CaptureFixture[str], corpus: str) -> None:
    assert run(["train", TRAIN, f"data.corpus={corpus}", "train.steps=7", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "  steps: 7\n" in printed
    assert f"  corpus: {corpus}\n" in printed
    assert "dp 1 x sp 2" in printed


def test_help_and_version_answer_at_once_without_heavy_libraries() -> None:
    script = (
        "import sys; from farspan.cli.main import run; code = run(['--help']);"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules);"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    for verb in (
        "quickstart",
        "data",
        "plan",
        "train",
        "report",
        "evaluate",
        "export",
        "serve",
        "chat",
        "bench",
        "version",
    ):
        assert verb in answer.stdout


def test_version_as_json_names_what_farspan_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    assert {"farspan", "python", "ray", "torch", "transformers", "nixl"} <= versions.keys()


def test_building_a_corpus_and_evaluating_an_exported_model_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    from farspan.models.checkpoint import load_tokenizer, make_config, random_causal_lm, save_causal_lm

    sources = REPOSITORY / "platform" / "farspan" / "config"
    (tmp_path / "corpus.yaml").write_text(f"sources: ['{sources}']\noutput: {tmp_path / 'corpus'}\nvocab_size: 300\n")
    assert run(["data", "build", str(tmp_path / "corpus.yaml")]) == 0
    assert "documents" in capsys.readouterr().out
    config = make_config(
        "llama", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    )
    tokenizer = load_tokenizer(tmp_path / "corpus" / "tokenizer")
    save_causal_lm(tmp_path / "model", config, random_causal_lm(config, 0).state_dict(), tokenizer)
    assert run(["export", str(tmp_path / "model"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    arguments = ["--corpus", str(tmp_path / "corpus"), "--sequences", "2", "--lengths", "200", "--json"]
    assert run(["evaluate", str(tmp_path / "half"), *arguments]) == 0
    (result,) = json.loads(capsys.readouterr().out)["loss"]
    # Random weights know nothing: about log(300) nats.
    assert result["loss"] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    assert sum(row[3] for row in result["by_position"]) == result["tokens"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--peers", "generat"], "--peers: must be generate, batching, both, or none, got 'generat'; did you mean"),
        (["--peers", "none", "--turns", "0"], "--turns: must be at least 1, got 0; use --turns 3"),
    ],
)
def test_a_bench_of_the_engine_refuses_what_it_cannot_run(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "engine", *words]) == 2
    assert sentence in capsys.readouterr().err
