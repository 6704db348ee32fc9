"""Ctrl-C ends a run as it ends every other command, and says how to go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from tests.end_to_end.test_quickstart import MARK, assert_nothing_is_left
from tests.support.corpus import small_corpus
from tests.support.runs import tiny_run

from farspan.config.load import dump_config


@pytest.mark.long
def test_ctrl_c_during_training_is_130_and_names_the_newest_checkpoint_and_the_command_that_goes_on(
    tmp_path: Path,
) -> None:
    settings = ["train.steps=100000", "train.checkpoint_every=1", "train.keep_checkpoints=2", "model.dtype=float32"]
    config = tiny_run(small_corpus(tmp_path), str(tmp_path / "run"), *settings)
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "farspan.cli.main", "train", "run.yaml", "name=one run", "train.resume=false"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, MARK: mark},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert any(line.startswith("checkpoint after step 2") for line in process.stdout)
        # As a terminal does: every process of the foreground group gets it.
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
        assert f"report: {tmp_path / 'run' / 'report.html'}\n" in rest
        (step, command) = re.findall(r"^newest checkpoint: .*/step-(\d+); go on with: (.*)$", rest, re.MULTILINE)[0]
        assert int(step) >= 2
        assert (tmp_path / "run" / "checkpoints" / f"step-{step}").is_dir()
        assert command == "farspan train run.yaml 'name=one run' train.resume=true"
        assert_nothing_is_left(mark)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=30)
