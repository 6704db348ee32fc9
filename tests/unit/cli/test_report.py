"""Every run leaves its report, however it ends, and the report can be written again from the record."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.support.corpus import REPOSITORY, small_corpus
from tests.support.s3 import S3Bucket

from farspan.cli.main import run
from farspan.cli.record import EVENTS_FILE, run_log
from farspan.cli.report import REPORT_FILE, reported
from farspan.config.schema import RunConfig
from farspan.errors import TrainingError
from farspan.telemetry.events import (
    EventBody,
    RunFailed,
    RunFinished,
    RunPreempted,
    RunStarted,
    StepReport,
    read_events,
)

STEP = StepReport(
    step=1, loss=2.5, learning_rate=1e-3, grad_norm=0.5, tokens=1000, num_labels=900, step_s=1.0, tokens_per_s=1000.0,
    peak_memory_bytes=2**20, bytes_sent=0,
)  # fmt: skip
STARTED = RunStarted(config="name: long <b>run</b>\nmodel: {architecture: llama}\n", plan="model: 12.4 M parameters")


def one_run(output: str, error: BaseException | None = None) -> None:
    """A run of one step at `output` that ends well, or by `error`."""
    with run_log(output) as log, reported(log, output):
        log.append(STARTED)
        log.append(STEP)
        if error is not None:
            raise error
        log.append(RunFinished(steps=1, tokens=1000, seconds=60.5))


def test_a_finished_run_leaves_its_report_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_run(str(tmp_path))
    report = tmp_path / REPORT_FILE
    assert capsys.readouterr().out == f"report: {report}\n"
    page = report.read_text(encoding="utf-8")
    for text in ("Finished in 60.5 s", "<h1>long &lt;b&gt;run&lt;/b&gt;</h1>", "llama, 12.4 M parameters", "cores"):
        assert text in page
    assert sorted(file.name for file in tmp_path.iterdir()) == [EVENTS_FILE, REPORT_FILE]


def test_the_verb_that_trains_leaves_the_report_of_a_run_that_failed_or_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ray(
        config: RunConfig, lines: object, tell: Callable[[EventBody], None], *_: object, own_ray: bool
    ) -> str | None:
        assert own_ray
        tell(STARTED)
        tell(STEP)
        if config.seed == 0:
            raise TrainingError("loss is not finite")
        tell(RunPreempted(step=1, reason="SIGTERM"))
        return None

    monkeypatch.setattr("farspan.jobs.launch.local_ray", lambda cpus, gpus: nullcontext())
    monkeypatch.setattr("farspan.jobs.train.run_training", without_ray)
    words = [str(REPOSITORY / "jobs" / "configs" / "quickstart.yaml"), f"data.corpus={small_corpus(tmp_path)}"]
    for seed, code, status in ((0, 1, "Failed after 1 step: loss is not finite"), (1, 143, "Stopped after step 1")):
        assert run(["train", *words, f"output={tmp_path / 'run'}", f"seed={seed}"]) == code
        assert f"report: {tmp_path / 'run' / REPORT_FILE}\n" in capsys.readouterr().out
        assert status in (tmp_path / "run" / REPORT_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingError("loss is not finite"), "loss is not finite"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_run_that_fails_records_why_and_leaves_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, reason: str
) -> None:
    with pytest.raises(type(error)) as raised:
        one_run(str(tmp_path), error)
    assert raised.value is error
    assert [event.body for event in read_events(tmp_path / EVENTS_FILE).events][-1] == RunFailed(reason=reason)
    assert f"Failed after 1 step: {reason}" in (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"report: {tmp_path / REPORT_FILE}\n"


def test_a_report_that_cannot_be_written_hides_no_error_and_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT_FILE).mkdir()
    one_run(str(tmp_path))
    with pytest.raises(TrainingError, match="not finite"):
        one_run(str(tmp_path), TrainingError("loss is not finite"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"no report was written: {tmp_path / REPORT_FILE}: the report cannot be written (")
        assert line.endswith(f"; `farspan report {tmp_path}` tries again")
    assert sorted(file.name for file in tmp_path.iterdir()) == [EVENTS_FILE, REPORT_FILE]


def test_a_run_that_never_began_leaves_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(str(tmp_path)) as log, reported(log, str(tmp_path)):
        pass
    assert not (tmp_path / REPORT_FILE).exists()
    assert capsys.readouterr().out == ""


def test_the_report_is_written_again_from_the_record_also_elsewhere_and_while_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere" / "page.html"
    with run_log(str(folder)) as log:
        log.append(STARTED)
        log.append(STEP)
        assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / REPORT_FILE}\n"
    assert "Not finished: the record ends after 1 step" in (folder / REPORT_FILE).read_text(encoding="utf-8")
    with (folder / EVENTS_FILE).open("ab") as file:
        file.write(b'{"schema":1')
    assert run(["report", str(folder), "--output", str(elsewhere)]) == 0
    said = capsys.readouterr()
    assert said.out == f"report: {elsewhere}\n"
    assert "11 bytes after the last event are ignored" in said.err
    assert "long &lt;b&gt;run&lt;/b&gt;" in elsewhere.read_text(encoding="utf-8")


def test_a_folder_without_a_record_is_refused_with_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)]) == 2
    expected = f"error: {tmp_path}: holds no {EVENTS_FILE}; name the output folder of a run\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_s3_has_its_report_beside_its_record(
    s3: S3Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"{s3.uri}/run"
    with pytest.raises(TrainingError):
        one_run(uri, TrainingError("loss is not finite"))
    assert capsys.readouterr().out == f"report: {uri}/{REPORT_FILE}\n"
    assert b"Failed after 1 step: loss is not finite" in s3.get(f"run/{REPORT_FILE}")
    assert b"loss is not finite" in s3.get(f"run/{EVENTS_FILE}")
    assert run(["report", uri, "--output", str(tmp_path / "page.html")]) == 0
    assert "Failed after 1 step" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert run(["report", uri]) == 0
    assert f"report: {uri}/{REPORT_FILE}" in capsys.readouterr().out
    assert f"<dd>{uri}</dd>".encode() in s3.get(f"run/{REPORT_FILE}")
