"""The engine's bench asks every contender the same, times only right answers, and waits for nobody without end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from farspan.engine import bench
from farspan.engine.bench import EngineBench, Work, bench_engine, contender, how_far_below
from farspan.engine.bench_contenders import FARSPAN, GENERATE, VLLM
from farspan.errors import ClusterError, ConfigError

SETTINGS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
}
WORKS = (Work("two", 2, 5, 3), Work("shared", 3, 2, 2, shared=20), Work("alone", 1, 4, 6))
# Answers a question of one token, and the others by what follows.
STAND_IN = """#!{python}
import json, os, sys, time
with os.fdopen(int(sys.argv[-1]), "w") as answers:
    print(json.dumps({{"ready": True}}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question["new_tokens"] > 1:
            {otherwise}
        tokens = [[3] * question["new_tokens"]] * len(question["prompts"])
        print(json.dumps({{"seconds": 1.0, "tokens": tokens}}), file=answers, flush=True)
"""


def stand_in(folder: Path, otherwise: str) -> str:
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable, otherwise=otherwise))
    python.chmod(0o700)
    return str(python)


def small(**settings: object) -> EngineBench:
    given = {
        "settings": SETTINGS,
        "works": WORKS,
        "starts": 0,
        "turns": 1,
        "threads": 1,
        "kv_bytes": 1 << 20,
        "peers": (),
        **settings,
    }
    return EngineBench(**given)  # type: ignore[arg-type]


def test_prompts_of_a_work_share_what_they_should_and_are_new_in_every_turn() -> None:
    work = Work("shared", 3, 2, 2, shared=20)
    first, second = work.prompts(101, 0), work.prompts(101, 1)
    assert [len(prompt) for prompt in first] == [22] * 3
    assert len({tuple(prompt[:20]) for prompt in first}) == 1
    assert len({tuple(prompt) for prompt in first}) == 3
    assert first[0][:20] != second[0][:20]
    assert first == work.prompts(101, 0)


@pytest.mark.long
def test_both_answer_alike_and_every_work_has_a_row_of_each() -> None:
    rows = bench_engine(small(peers=(GENERATE,), dtype="float32", starts=1))
    assert not [row["wrong"] for row in rows if "wrong" in row]
    timed = [(row["work"], row["contender"]) for row in rows if "seconds" in row]
    assert timed == [(w, c) for w in ("start to first token", "two", "shared", "alone") for c in (FARSPAN, GENERATE)]
    assert all(row["speed of farspan / peer"] > 0 for row in rows if row.get("contender") == GENERATE)
    (bound,) = [row for row in rows if "part of the bound" in row]
    assert bound["work"] == "alone"


@pytest.mark.long
def test_a_contender_that_makes_tokens_up_gets_no_time(tmp_path: Path) -> None:
    rows = bench_engine(small(works=WORKS[:1], vllm_python=stand_in(tmp_path, "pass")))
    found = [row for row in rows if row.get("contender") == VLLM]
    assert found
    assert all("deviations below the best" in row["wrong"] and "seconds" not in row for row in found)
    assert not [row for row in rows if row.get("contender") == FARSPAN and "wrong" in row]


@pytest.mark.long
def test_no_speed_is_told_beside_wrong_answers_of_farspan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = iter([3.0] * 4 + [0.0] * 4)
    monkeypatch.setattr(bench, "how_far_below", lambda model, prompt, answer: next(below))
    rows = bench_engine(small(works=WORKS[2:], vllm_python=stand_in(tmp_path, "pass")))
    assert all("wrong" in row for row in rows if row.get("contender") == FARSPAN)
    assert not [row for row in rows if "speed of farspan / peer" in row or "part of the bound" in row]


@pytest.mark.long
def test_a_contender_that_is_late_is_not_waited_for_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "how_far_below", lambda model, prompt, answer: 0.0)
    # It answers what it is checked with, and starts a process of its own that would outlive it.
    late = "os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', '987.25'); time.sleep(600 if question['new_tokens'] == 6 else 0)"
    rows = bench_engine(small(works=WORKS[2:], vllm_python=stand_in(tmp_path, late), deadline_s=20.0))
    assert [row["contender"] for row in rows if "not_measured" in row] == [VLLM]
    assert [row["contender"] for row in rows if "seconds" in row] == [FARSPAN]
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert b"sleep\x00987.25\x00" not in commands


def test_who_is_not_asked_stands_still(tmp_path: Path) -> None:
    bench_of_one = small(vllm_python=stand_in(tmp_path, "pass"))

    def wait_until_it_stands() -> None:
        (process,) = psutil.Process().children()
        deadline = time.monotonic() + 30
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, process.status()

    with contender(VLLM, tmp_path, bench_of_one, tmp_path / "log") as it:
        wait_until_it_stands()
        assert it.ask([[1]], 1, 30.0) == (1.0, [[3]])
        wait_until_it_stands()
    assert psutil.Process().children() == []


@pytest.mark.long
def test_a_contender_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="vllm died with code 7"):
        bench_engine(small(works=WORKS[:1], vllm_python=stand_in(tmp_path, "sys.exit(7)")))


def test_an_environment_without_python_is_refused() -> None:
    with pytest.raises(ConfigError, match="--vllm-env"):
        bench_engine(small(vllm_python="/nowhere/bin/python"))


def test_a_token_that_is_not_the_best_is_measured_in_deviations() -> None:
    import torch

    class Model:
        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            logits = torch.zeros(1, input_ids.shape[1], 4)
            logits[..., 2] = 4.0
            return type("Out", (), {"logits": logits})

    assert how_far_below(Model(), [0, 1], [2, 2]) == 0
    assert how_far_below(Model(), [0, 1], [2, 1]) == pytest.approx(2.0)
