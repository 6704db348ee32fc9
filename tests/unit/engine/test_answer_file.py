"""A file of answers holds one record for each line, and never answers to two different questions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.engine.ledger import answer, ledger_engine
from tests.unit.engine.test_offline import PARAMS, offline, read, write

from farspan.engine.answer_file import AnswerFile, fcntl
from farspan.engine.offline import OfflineEngine, run_offline
from farspan.engine.origin import Origin
from farspan.errors import ConfigError, EngineError

RECORDS: list[object] = [{"id": f"p{n}", "tokens": [n, 5]} for n in range(6)]


def answered(folder: Path, records: list[object] = RECORDS) -> tuple[Path, Path]:
    prompts, output = write(folder / "in.jsonl", records), folder / "out.jsonl"
    run_offline(offline(), prompts, output, PARAMS, id)
    return prompts, output


def test_a_line_that_failed_is_asked_again_and_its_answer_takes_the_place_of_the_error(tmp_path):
    prompts = write(tmp_path / "in.jsonl", [*RECORDS, {"id": "long", "tokens": list(range(40))}, "{torn"])
    real = tmp_path / "answers" / "out.jsonl"
    real.parent.mkdir()
    output = tmp_path / "out.jsonl"
    output.symlink_to(real)
    first = run_offline(offline(11), prompts, output, PARAMS, id)
    assert (first.answered, first.failed) == (6, 2)
    assert "engine.kv_bytes" in read(output)["long"]["error"]
    real.chmod(0o640)
    second = run_offline(offline(), prompts, output, PARAMS, id)
    assert (second.skipped, second.answered, second.failed, second.total) == (6, 1, 1, 8)
    assert read(output)["long"]["tokens"] == answer(list(range(40)), PARAMS.max_tokens)
    assert output.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["out.jsonl"]
    assert real.stat().st_mode & 0o777 == 0o640


def test_errors_are_gone_before_anything_is_asked_again(tmp_path):
    _, output = answered(tmp_path, [*RECORDS, "{torn"])
    file = AnswerFile(output)
    assert len(read(output)) == len(file.done) == 6
    with pytest.raises(EngineError, match="being written by another process"):
        AnswerFile(output)
    file.close()


def test_lines_that_were_added_are_answered_into_the_same_file(tmp_path):
    prompts, output = answered(tmp_path)
    write(prompts, [{"id": "new", "tokens": [9]}, *RECORDS, {"tokens": [8]}])
    progress = run_offline(offline(), prompts, output, PARAMS, id)
    assert (progress.skipped, progress.answered) == (6, 2)
    assert len(read(output)) == 8


def without_digests(output: Path) -> None:
    records = [json.loads(line) for line in output.read_text().splitlines()]
    write(output, [{key: value for key, value in record.items() if key != "asked"} for record in records])


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (lambda prompts, _: write(prompts, [*RECORDS[1:], {"id": "p0", "tokens": [9]}]), {}, "'p0' was asked with"),
        (lambda prompts, output: write(prompts, RECORDS[1:]), {}, "1 of its answers are to no line"),
        (lambda prompts, output: write(prompts, [*RECORDS[1:], '{"id": "p0"}']), {}, "1 of its answers are to no line"),
        (lambda prompts, output: None, {"max_tokens": 7}, "'p0' was asked with"),
        (lambda prompts, output: None, {"stop_token_ids": frozenset({3})}, "'p0' was asked with"),
        (lambda prompts, output: without_digests(output), {}, "does not say what it was asked: an older version"),
    ],
)
def test_answers_to_something_else_are_never_added_to(
    tmp_path: Path, change: Callable[[Path, Path], object], more: dict, reason: str
):
    prompts, output = answered(tmp_path)
    change(prompts, output)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=reason) as refusal:
        run_offline(offline(), prompts, output, replace(PARAMS, **more), id)
    assert str(output) in str(refusal.value)
    assert str(refusal.value).endswith("choose another file, or remove this one")
    assert output.read_bytes() == before


def test_another_model_never_goes_on_with_the_answers_of_the_first(tmp_path):
    prompts, output = answered(tmp_path)
    other = OfflineEngine(ledger_engine(200)[0], None, 8, Origin("another"))
    with pytest.raises(ConfigError, match="with another model"):
        run_offline(other, prompts, output, PARAMS, id)


def test_a_file_that_another_process_replaces_while_it_is_being_locked_is_not_written(tmp_path, monkeypatch):
    _, output = answered(tmp_path)
    fresh = write(tmp_path / "fresh", [])

    def flock(_file: object, _how: int) -> None:
        os.replace(fresh, output)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(EngineError, match="being written by another process"):
        AnswerFile(output)
