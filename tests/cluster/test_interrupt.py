"""Ctrl-C ends a run as it ends every other command, and says how to go on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.corpus import small_corpus
from tests.support.marked import interrupted
from tests.support.runs import tiny_run

from farspan.config.load import dump_config


@pytest.mark.long
def test_ctrl_c_during_training_is_130_and_names_the_newest_checkpoint_and_the_command_that_goes_on(
    tmp_path: Path,
) -> None:
    settings = ["train.steps=100000", "train.checkpoint_every=1", "train.keep_checkpoints=2", "model.dtype=float32"]
    config = tiny_run(small_corpus(tmp_path), str(tmp_path / "run"), *settings)
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    rest = interrupted(["train", "run.yaml", "name=one run", "train.resume=false"], tmp_path, "checkpoint after step 2")
    assert f"report: {tmp_path / 'run' / 'report.html'}\n" in rest
    (step, command) = re.findall(r"^newest checkpoint: .*/step-(\d+); go on with: (.*)$", rest, re.MULTILINE)[0]
    assert int(step) >= 2
    assert (tmp_path / "run" / "checkpoints" / f"step-{step}").is_dir()
    assert command == "farspan train run.yaml 'name=one run' train.resume=true"
