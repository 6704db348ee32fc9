"""A certificate vouches for one model and one layout, or a run does not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.decoders import decoder_config

from farspan.config.schema import ParallelConfig
from farspan.errors import ConfigError, CorruptDataError, NotFoundError
from farspan.verify.certificate import certify, model_hash, read_certificate, refuse_certificate
from farspan.verify.judge import Check

LLAMA, LAYOUT = decoder_config("llama"), ParallelConfig(workers=4, sp=2)
GOOD, BAD = Check("loss", 1e-15, 1e-9), Check("logits", float("nan"), 1e-9)


def text(*checks: Check) -> str:
    return certify(LLAMA, LAYOUT, checks).to_json()


def test_a_certificate_survives_its_file_and_vouches_for_its_run(tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    file.write_text(text(GOOD), encoding="utf-8")
    read = read_certificate(str(file))
    assert json.loads(read)["passed"] is True
    refuse_certificate(str(file), read, LLAMA, LAYOUT)


def test_more_sequences_side_by_side_are_the_same_layout() -> None:
    refuse_certificate("c", text(GOOD), LLAMA, ParallelConfig(workers=8, sp=2))


def test_vocabulary_and_length_do_not_change_which_model_it_is_but_heads_do() -> None:
    assert model_hash(decoder_config("llama", vocab_size=300, max_position_embeddings=64)) == model_hash(LLAMA)
    assert model_hash(decoder_config("llama", num_key_value_heads=4)) != model_hash(LLAMA)


def test_another_model_another_layout_and_a_failed_check_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be of this run's model"):
        refuse_certificate("c", text(GOOD), decoder_config("qwen3"), LAYOUT)
    with pytest.raises(ConfigError, match=r"parallel.strategy=ring.*'ulysses'"):
        refuse_certificate("c", text(GOOD), LLAMA, ParallelConfig(workers=2, sp=2, strategy="ring"))
    with pytest.raises(ConfigError, match=r"must have passed.*failed: logits"):
        refuse_certificate("c", text(GOOD, BAD), LLAMA, LAYOUT)
    with pytest.raises(ConfigError, match="nothing was checked"):
        refuse_certificate("c", text(), LLAMA, LAYOUT)


def test_a_verdict_that_was_edited_does_not_help() -> None:
    edited = text(GOOD, BAD).replace('"passed": false', '"passed": true')
    with pytest.raises(ConfigError, match="failed: logits"):
        refuse_certificate("c", edited, LLAMA, LAYOUT)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 1, "layout": {}, "checks": 3}'])
def test_a_file_that_is_no_certificate_is_called_so(content: str) -> None:
    with pytest.raises(CorruptDataError, match="is not a certificate"):
        refuse_certificate("c", content, LLAMA, LAYOUT)


def test_a_missing_certificate_names_the_way_to_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="farspan doctor --certificate"):
        read_certificate(str(tmp_path / "none.json"))
