"""A training job on Ray Train learns what plain transformers and torch learn from the same tokens."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY

from farspan.jobs.bench_train import curve_row

# In a process of its own: the bench starts and stops a Ray, and this session has one.
_SHORT = """
import json, sys
from farspan.jobs.bench_train import TrainBench, bench_train
print(json.dumps(bench_train(TrainBench(
    num_steps=20, width=64, layers=2, heads=4, vocab_size=400, sequence_tokens=256, threads=1, lr=3e-3,
    warm_steps=2, goal_curve=0.0, max_documents=30, sources=(sys.argv[1],),
))))
"""


@pytest.mark.long
def test_a_job_of_twenty_steps_has_the_loss_curve_of_plain_transformers_and_torch() -> None:
    source = str(REPOSITORY / "platform" / "farspan" / "config")
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n{_indented(_SHORT)}", source],
        cwd=Path.home(), stdout=subprocess.PIPE, text=True, timeout=560, check=True,
    )  # fmt: skip
    plain, job, turns, curve = json.loads(done.stdout.strip().splitlines()[-1])
    assert plain["tokens_per_s"] > 0
    assert job["tokens_per_s"] > 0
    assert plain["steps"] == job["steps"] == 18
    assert math.isfinite(turns["farspan job / plain"])
    assert curve["steps"] == 20
    assert curve["largest difference"] < 1e-4
    # The goal here is one that nothing reaches: the plain loop is held against itself.
    assert "wrong" in curve
    assert 0 < curve["plain's own, from weights one rounding away"] < 1e-4
    assert curve["job's loss at the end"] < 0.9 * curve["first loss"]


def test_curves_that_part_are_wrong_also_where_one_is_not_a_number() -> None:
    plain = (3.0, 2.0, 1.0)
    assert "wrong" not in curve_row((3.0, 2.0, 1.0005), plain, 1)
    assert "wrong" in curve_row((3.0, 2.002, 1.0), plain, 1)
    assert "wrong" in curve_row((math.nan, 2.0, 1.0), plain, 1)
    assert "wrong" in curve_row(plain, (3.0, math.nan, 1.0), 1)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
