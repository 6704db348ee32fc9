"""A line may say what HTTP takes for plain text, and draws by its place in the file alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.engine.test_offline import offline, read, write

from farspan.engine.answer_file import AnswerFile
from farspan.engine.offline import Progress, in_blocks, open_lines, run_offline
from farspan.engine.origin import Origin
from farspan.engine.prompts import Answered, Question, parse_line
from farspan.engine.request import Grammar, SamplingParams

PARAMS = SamplingParams(max_tokens=6)
SAMPLED = SamplingParams(max_tokens=8, temperature=1.0, seed=3)


def parsed(number: int = 1, **record: object) -> Question | Answered:
    return parse_line(json.dumps({"tokens": [1], **record}).encode(), number, PARAMS, Origin())


def asked(**record: object) -> SamplingParams:
    line = parsed(**record)
    assert isinstance(line, Question), line
    return line.params


def refused(**record: object) -> str:
    line = parsed(**record)
    assert isinstance(line, Answered)
    assert line.error
    return line.error


def sampled_records() -> list[object]:
    same = [{"id": f"p{n}", "tokens": [n % 3, 5]} for n in range(24)]
    return [*same, *({"id": name, "tokens": [1, 5], "seed": 7} for name in ("own", "again"))]


def tokens_of(path: Path) -> dict[object, list[int]]:
    return {name: record["tokens"] for name, record in read(path).items()}


def test_equal_prompts_are_answered_differently_and_those_of_one_seed_alike(tmp_path):
    prompts = write(tmp_path / "in.jsonl", sampled_records())
    run_offline(offline(), prompts, tmp_path / "out.jsonl", SAMPLED, id)
    answers = tokens_of(tmp_path / "out.jsonl")
    assert answers["own"] == answers["again"]
    assert len({tuple(tokens) for tokens in answers.values()}) == 25
    # Prompts of one length do not share their draws either: what is drawn first differs, too.
    assert len({tokens[0] for tokens in answers.values()}) > 12


def test_sampled_answers_are_the_same_when_resumed_half_way_and_when_engines_share_the_lines(tmp_path):
    prompts = write(tmp_path / "in.jsonl", sampled_records())
    run_offline(offline(), prompts, tmp_path / "whole.jsonl", SAMPLED, id)
    whole = tokens_of(tmp_path / "whole.jsonl")

    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.answered == 13:
            raise StopError

    with pytest.raises(StopError):
        run_offline(offline(), prompts, tmp_path / "halves.jsonl", SAMPLED, stop)
    assert run_offline(offline(), prompts, tmp_path / "halves.jsonl", SAMPLED, id).answered == 13
    assert tokens_of(tmp_path / "halves.jsonl") == whole
    engines, file = [offline(), offline()], AnswerFile(tmp_path / "shares.jsonl")
    _, lines = open_lines(prompts, file, SAMPLED, engines[0].origin, None)
    shares = list(in_blocks(lines, 5))
    for number, share in enumerate(reversed(shares)):
        file.append(engines[number % 2].answers(share))
    file.close()
    assert tokens_of(tmp_path / "shares.jsonl") == whole


def test_what_a_line_draws_by_is_its_number_or_its_seed():
    lines = [parsed(4), parsed(5), parsed(5, seed=9)]
    assert [(line.params.seed, line.params.request) for line in lines] == [(0, 4), (0, 5), (9, 0)]


def test_stop_is_a_text_or_a_list_of_texts():
    assert asked(stop=["a", "b"]).stop == ("a", "b")
    assert asked(stop="ab").stop == ("ab",)
    assert refused(stop=[1]) == "stop: must be a list of texts, got [1]"


@pytest.mark.parametrize("key", ["n", "choice", "request", "logprobs", "prompt_logprobs"])
def test_what_an_answer_line_cannot_hold_is_refused_by_name(key):
    assert refused(**{key: 2}) == f"{key}: cannot be asked for in a file of prompts"


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
            Grammar("json_schema", '{"type": "null"}'),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, Grammar("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, Grammar("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": True}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"disable_fallback": True, "disable_additional_properties": False}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, Grammar("lark", 'start: "yes" | "no"')),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, Grammar("lark", 'start: "x"')),
    ],
)
def test_the_form_of_an_answer_is_asked_for_as_over_http(fields, grammar):
    assert asked(**fields).grammar == grammar


def test_a_form_that_is_none_is_refused_in_a_sentence():
    deep: dict = {}
    for _ in range(200):
        deep = {"not": deep}
    for fields, reason in (
        ({"response_format": "json"}, "response_format: must be of type"),
        ({"response_format": {"type": "json_schema"}}, "which has json_schema.schema"),
        ({"structured_outputs": ["json"]}, "structured_outputs: must be a JSON object, got list"),
        ({"structured_outputs": {"regexp": "a"}}, "got regexp with str"),
        ({"structured_outputs": {"choice": []}}, "choice must be 1 to"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "one form only"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "one form only"),
        ({"structured_outputs": {"json": deep}}, "not deeper than"),
        ({"grammar": "x"}, "grammar: is not a known key"),
        ({"structured_outputs": {"regexp": False}}, "got regexp with bool"),
        (
            {"structured_outputs": {"json": "{"}},
            "structured_outputs: json must be a JSON schema, an object or its text",
        ),
        ({"structured_outputs": {"json": '"{}"'}}, "structured_outputs: json must be a JSON schema, an object or its"),
        ({"structured_outputs": {"regex": "a", "disable_additional_properties": True}}, "got disable_additional_prop"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "only the type json_schema has a schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "only the type json_schema has a"),
    ):
        assert reason in refused(**fields), fields


def test_bias_is_of_tokens_as_over_http():
    assert asked(logit_bias={"17": -100, "4": 0.5}).logit_bias == ((17, -100.0), (4, 0.5))
    for wrong in ([17], {"a": 1}, {"1": "2"}, {"1": True}):
        assert refused(logit_bias=wrong).startswith("logit_bias: must be numbers by tokens")


def test_tokens_and_words_that_bind_an_answer_are_lists_as_over_http():
    assert asked(allowed_token_ids=[5, 3, 5]).allowed_token_ids == {3, 5}
    assert asked(bad_words=["a", "b"], include_stop_str_in_output=True).bad_words == ("a", "b")
    assert refused(allowed_token_ids=[]).startswith("allowed_token_ids: must name at least one token")
    assert refused(bad_words="a") == "bad_words: must be a list of texts, got 'a'"
    assert refused(include_stop_str_in_output=1) == "include_stop_str_in_output: must be of type bool, got 1"


def test_null_is_the_default_as_over_http():
    assert asked(stop=None, seed=None, allowed_token_ids=None, max_tokens=None) == asked()


def test_numbers_beyond_a_float_and_halves_of_a_character_are_errors_of_their_line():
    assert "too large" in refused(temperature=10**400)
    assert "surrogate" in refused(id="\ud800")


def test_the_digest_of_a_line_is_of_what_its_answer_depends_on():
    def digest(number: int = 1, params: SamplingParams = PARAMS, origin: Origin | None = None, **record: object) -> str:
        line = parse_line(json.dumps({"tokens": [1], **record}).encode(), number, params, origin or Origin())
        assert isinstance(line, Question)
        return line.asked

    same = digest()
    assert digest(7, id="other", max_tokens=6) == same
    assert digest(params=replace(PARAMS, seed=5)) == same, "nothing is drawn"
    other = [
        digest(tokens=[2]),
        digest(max_tokens=7),
        digest(stop_token_ids=[4, 5]),
        digest(stop="x"),
        digest(adapter="law"),
        digest(adapter="law", origin=Origin("", {"law": "b"})),
        digest(origin=Origin("b")),
        digest(response_format={"type": "json_object"}),
        digest(temperature=0.5),
        digest(7, temperature=0.5),
        digest(temperature=0.5, seed=2),
    ]
    assert len({same, *other}) == 12
    assert digest(7, temperature=0.5, seed=2) == other[-1]
