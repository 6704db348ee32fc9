"""A file of prompts is answered line by line, whatever some lines say and wherever an earlier run stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.support.double import DoublePrecision
from tests.support.zoo import zoo_model
from tests.unit.engine.adapted import assert_greedy, lora, opened, rows, save
from tests.unit.engine.ledger import answer, ledger_engine
from tests.unit.engine.tiny import VOCAB, engine_config
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.schema import EngineConfig
from farspan.engine.answer_file import AnswerFile
from farspan.engine.engine import Engine
from farspan.engine.offline import OfflineEngine, Progress, order_lines, run_offline
from farspan.engine.prompts import Prompt
from farspan.engine.request import SamplingParams
from farspan.errors import CorruptDataError, EngineError, NotFoundError

PARAMS = SamplingParams(max_tokens=6)


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path: Path) -> dict[object, dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["id"] or record["line"]: record for record in records}
    assert len(found) == len(records), "a line was answered twice"
    return found


def offline(num_pages: int = 200) -> OfflineEngine:
    return OfflineEngine(ledger_engine(num_pages, max_batch_tokens=64, max_sequences=8)[0], None, 8)


def test_every_line_is_answered_and_a_bad_one_is_an_error_of_its_own(tmp_path):
    good = [{"id": f"p{i}", "tokens": [i, 1, 2], "max_tokens": i % 4 + 1} for i in range(40)]
    bad = {
        "{torn": "line 1 column",
        "[]": "must be a JSON object",
        '{"id": "none"}': "exactly one of",
        '{"id": "text", "prompt": "hello"}': "tokenizer",
        '{"id": "typo", "tokens": [1], "max_tokenz": 3}': "did you mean 'max_tokens'",
        '{"id": "type", "tokens": [1], "max_tokens": "3"}': "must be of type int",
        '{"id": "p3", "tokens": [1]}': "given before",
        '{"id": "empty", "tokens": []}': "prompt is empty",
        f'{{"id": "outside", "tokens": [{VOCAB}]}}': "outside the vocabulary",
        '{"id": "hot", "tokens": [1], "temperature": -1}': "temperature",
        '{"id": "long", "tokens": [1], "max_tokens": 5000}': "",
    }
    prompts = write(tmp_path / "in.jsonl", [*good, *bad, "", {"tokens": [9, 9]}])
    seen: list[int] = []
    progress = run_offline(offline(), prompts, tmp_path / "out.jsonl", PARAMS, lambda p: seen.append(p.answered))
    answers = read(tmp_path / "out.jsonl")
    for record in good:
        assert answers[record["id"]]["tokens"] == answer(record["tokens"], record["max_tokens"])
    assert answers["line-53"]["tokens"] == answer([9, 9], 6)
    for number, (text, reason) in enumerate(bad.items(), start=41):
        (found,) = [a for a in answers.values() if a["line"] == number]
        assert reason in found.get("error", ""), text
    assert (progress.answered, progress.failed, progress.skipped, progress.total) == (42, 10, 0, 52)
    assert seen[-1] == 42
    assert len(answers) == 52


@pytest.mark.parametrize("torn", ["", '{"id": "p1', '{"id": "p0", "line": 1, "tokens": [1]}'])
def test_a_second_run_answers_what_is_missing_and_mends_a_torn_line(tmp_path, torn):
    records = [{"id": f"p{i}", "tokens": [i, 5]} for i in range(30)]
    prompts, output = write(tmp_path / "in.jsonl", ["{bad", *records]), tmp_path / "out.jsonl"
    first = offline()

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.answered == 11:
            raise StopError

    with pytest.raises(StopError):
        run_offline(first, prompts, output, PARAMS, stop)
    assert not first.engine.has_work
    assert first.engine.pool.num_held == 0
    with output.open("a") as file:
        file.write(torn)
    progress = run_offline(offline(), prompts, output, PARAMS, lambda _: None)
    assert (progress.skipped, progress.answered, progress.failed, progress.total) == (11, 19, 1, 31)
    answers = read(output)
    assert [answers[f"p{i}"]["tokens"] for i in range(30)] == [answer([i, 5], 6) for i in range(30)]
    before = sorted(output.read_bytes().splitlines())
    assert run_offline(offline(), prompts, output, PARAMS, lambda _: None).skipped == 30
    assert sorted(output.read_bytes().splitlines()) == before


def test_a_batch_over_pages_that_were_lost_does_not_end_well():
    opened = offline()
    lines = [Prompt(f"p{i}", i + 1, (i, 1, 2), PARAMS) for i in range(3)]
    assert len(list(opened.answers(lines))) == 3
    opened.engine.pool._free.pop()
    answers = opened.answers(lines)
    assert [next(answers).error for _ in lines] == [None] * 3
    with pytest.raises(EngineError, match="lost or doubly owned"):
        next(answers)


def test_shared_beginnings_are_computed_once_although_the_lines_are_shuffled(tmp_path):
    chance = random.Random(2)
    starts = [[chance.randrange(VOCAB) for _ in range(40)] for _ in range(12)]
    records = [{"tokens": [*start, other]} for start in starts for other in range(6)]
    chance.shuffle(records)
    prompts = write(tmp_path / "in.jsonl", records)
    # Pages for three of the twelve beginnings: found by chance, most would be gone.
    engine, ledger = ledger_engine(36, max_batch_tokens=64, max_sequences=3)
    run_offline(OfflineEngine(engine, None, 3), prompts, tmp_path / "out.jsonl", SamplingParams(max_tokens=1), id)
    assert ledger.num_tokens == 12 * 40 + 72


def test_two_runs_never_write_one_file_and_a_foreign_file_is_left_alone(tmp_path):
    prompts = write(tmp_path / "in.jsonl", [{"tokens": [1]}])
    open_one = AnswerFile(tmp_path / "out.jsonl")
    with pytest.raises(EngineError, match="being written by another"):
        run_offline(offline(), prompts, tmp_path / "out.jsonl", PARAMS, id)
    open_one.close()
    with pytest.raises(CorruptDataError, match=r"in\.jsonl:1: is no answer"):
        run_offline(offline(), prompts, prompts, PARAMS, id)
    assert json.loads(prompts.read_text()) == {"tokens": [1]}
    with pytest.raises(NotFoundError):
        run_offline(offline(), tmp_path / "nothing", tmp_path / "out.jsonl", PARAMS, id)


def test_text_and_messages_become_tokens_by_the_models_own_tokenizer(tmp_path):
    write_tiny_model(tmp_path / "model")
    opened = OfflineEngine.open(tmp_path / "model", EngineConfig(dtype="float64", kv_bytes=8 * 1024 * 1024))
    tokenizer = opened.tokenizer
    talk = [{"role": "user", "content": "def run"}]
    records = [
        {"id": "text", "prompt": "import threading"},
        {"id": "talk", "messages": talk},
        {"id": "wrong", "messages": 3},
    ]
    prompts, output = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    run_offline(opened, prompts, output, PARAMS, id)
    answers = read(output)
    asked = {"text": "import threading", "talk": "user: def run\nassistant:"}
    for name, text in asked.items():
        tokens = tokenizer(text)["input_ids"]
        (expected,) = opened.engine.generate([tokens], PARAMS)
        assert answers[name]["tokens"] == list(expected.tokens)
        assert answers[name]["prompt_tokens"] == len(tokens)
        assert answers[name]["text"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert "chat template" in answers["wrong"]["error"]


def test_a_line_names_its_adapter_and_an_unknown_one_is_an_error_of_that_line(tmp_path):
    base = zoo_model("llama")
    made = {
        name: save(tmp_path / name, base, lora(target_modules="all-linear"), seed) for seed, name in enumerate("ab")
    }
    prompts, output = rows(9, 14), tmp_path / "out.jsonl"
    records = [
        {"id": f"{number} {name}", "tokens": prompt, "max_tokens": 12, **({"adapter": name} if name else {})}
        for number, prompt in enumerate(prompts)
        for name in ("a", "", "b")
    ]
    wrong = [{"id": "who", "tokens": [1], "adapter": "c"}, {"id": "what", "tokens": [1], "adapter": 3}]
    file = write(tmp_path / "in.jsonl", [*records, *wrong])
    with DoublePrecision():
        engine = Engine(base, engine_config(adapters=made))
        run_offline(OfflineEngine(engine, None, 4), file, output, PARAMS, id)
        answers = read(output)
        for record in records:
            oracle = opened("llama", made.get(record.get("adapter", "")))
            assert_greedy(oracle, record["tokens"], answers[record["id"]]["tokens"])
    assert answers["who"]["error"] == "no adapter 'c' is here; known: a, b"
    assert answers["what"]["error"] == "adapter: must be the name of an adapter, got 3"


def test_prompts_of_one_adapter_are_neighbours_because_they_share_nothing_with_the_others():
    start = (7, 7, 7)
    lines = [Prompt(f"{i}", i, (*start, i % 3), PARAMS, adapter="ab"[i % 2]) for i in range(12)]
    ordered = list(order_lines(lines))
    assert sorted(ordered, key=lambda line: line.line) == lines
    assert [line.adapter for line in ordered] == ["a"] * 6 + ["b"] * 6
