"""`farspan plan --gpu`: what it prints, and what it answers to what cannot be planned."""

from __future__ import annotations

import json

import pytest
from tests.support.corpus import REPOSITORY

from farspan.cli.main import run
from farspan.cli.plan import parse_tokens
from farspan.errors import ConfigError

CONFIG = str(REPOSITORY / "jobs" / "configs" / "plan_8b.yaml")
SMALL = ["--model", "llama", "hidden_size=256", "num_hidden_layers=4", "num_attention_heads=4", "vocab_size=999"]


def test_a_plan_names_its_bytes_its_time_and_what_breaks_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["plan", CONFIG, "--gpu", "h100:8", "--seq", "1M", "--explain"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines())
    for part in (
        "llama, 8.03 B parameters, 32 layers of full attention",
        "8 x h100 of 74.5 GiB",
        "1,048,576 tokens",
        "parallel.sp=8",
        "8,192 bytes of a token and layer (8 Hkv d), recompute 8,192 (2 h)",
        "device memory overflows, most is",
        "nothing the model keeps or makes grows with the square",
        "nearest: ",
    ):
        assert part in printed
    assert "beyond " in printed


def test_json_holds_the_ranked_plans_as_config_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *SMALL, "--gpu", "l4:2", "--nodes", "2", "--seq", "64K", "--top", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["plans"]) == 3
    first = report["plans"][0]
    assert first["settings"]["parallel.workers"] == 4
    assert first["step_s"] == pytest.approx(
        first["compute_s"]
        + first["exposed_exchange_s"]
        + first["exposed_weights_s"]
        + first["exposed_offload_s"]
        + first["optimizer_s"]
    )
    assert sum(first["device_buffers_bytes"].values()) == pytest.approx(first["tiers_bytes"]["device"], abs=20)
    assert report["num_plans"] > 3
    assert report["breaks_first"]["longest_tokens"] >= 65_536


def test_what_does_not_fit_is_told_the_nearest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", CONFIG, "--gpu", "h100", "--seq", "1M"]) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: 1,048,576 tokens of llama do not fit on 1 x h100; nearest that does: --seq ")
    assert "or --nodes " in message
    length = int(message.split("--seq ")[1].split()[0])
    assert run(["plan", CONFIG, "--gpu", "h100", "--seq", str(length)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10:8"], "--gpu: must be NAME or NAME:COUNT of a known device, got 'h10:8'; did you mean 'h100'?"),
        (["--gpu", "h100:0"], "--gpu: must end in a number of devices, got 'h100:0'; use --gpu h100:8"),
        (
            ["--gpu", "h100", "--seq", "much"],
            "--seq: must be a number of tokens, such as 131072, 128K or 1M, got 'much'",
        ),
        (["--gpu", "h100", "--seq", "0"], "--seq: must lie in 2..1,073,741,824 tokens, got '0'; use --seq 2"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes: must be at least 1, got 0; use --nodes 1"),
        (
            ["--gpu", "h100", "--memory", "99"],
            "--memory: must lie in 2..74.5 GiB for h100, got 99.0; use --memory 74.5",
        ),
        (["--gpu", "h100", "--optimizer", "adam8"], "--optimizer: must be one of adamw, adamw8bit, got 'adam8'"),
        (["--seq", "1M"], "--gpu: must be given with --seq, got None; add for example --gpu h100:8"),
        (["--gpu", "h100", "parallel.ps=2"], "parallel.ps: is not a known key, got 2; did you mean 'sp'?"),
    ],
)
def test_a_wrong_option_is_answered_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["plan", CONFIG, *arguments]) == 2
    answer = capsys.readouterr().err.strip()
    assert answer.startswith(f"error: {message}")
    assert "\n" not in answer


def test_an_unknown_architecture_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "lama", "--gpu", "h100:8"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: model.architecture: must be a model_type of transformers, got 'lama'; did you")


@pytest.mark.parametrize(
    ("text", "tokens"), [("131072", 131_072), ("128K", 131_072), ("1M", 1 << 20), ("1.5m", 3 << 19), ("1_000", 1000)]
)
def test_lengths_are_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


def test_a_part_of_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a whole number of tokens"):
        parse_tokens("10.5")
