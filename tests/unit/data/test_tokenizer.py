"""A tokenizer trained here gives back every text exactly, to us and to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from farspan.data.tokenizer import END_OF_TEXT, copy_tokenizer, open_encoder, train_tokenizer
from farspan.errors import ConfigError, NotFoundError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "class Größe:\n\t'''naïve — 日本語 🎉'''\n",
    "for i in range(10):\n    print(i)\n",
] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), 320, folder)
    return folder


@pytest.fixture(scope="module")
def auto(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


# Every code point but surrogates, which no UTF-8 file can hold.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(any_text)
def test_every_text_comes_back_exactly(folder: Path, auto: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = open_encoder(folder, "x").encode([text])
    assert auto.decode(ids, skip_special_tokens=False) == text
    assert open_encoder(folder, "x").tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    ["  two leading spaces", " .", "a ,b n't", "\r\n\x00\ufeff\x7f", "e\u0301 \u00e9", "x  \n\n  ", "hello . world !"],
)
def test_spaces_controls_and_accents_come_back_exactly(auto: PreTrainedTokenizerFast, text: str) -> None:
    assert auto.decode(auto.encode(text)) == text


def test_transformers_and_the_corpus_spell_a_text_alike(folder: Path, auto: PreTrainedTokenizerFast) -> None:
    text = TEXTS[1]
    assert open_encoder(folder, "x").encode([text]) == [auto.encode(text)]


def test_the_end_of_text_is_begin_end_and_padding(folder: Path, auto: PreTrainedTokenizerFast) -> None:
    encoder = open_encoder(folder, "x")
    assert auto.eos_token_id == auto.bos_token_id == auto.pad_token_id == encoder.eos_token_id
    assert auto.eos_token == END_OF_TEXT
    assert len(auto) == encoder.vocab_size == 320


def test_a_text_that_spells_the_end_of_text_does_not_end_there(folder: Path) -> None:
    encoder = open_encoder(folder, "x")
    (ids,) = encoder.encode([f"EOS = '{END_OF_TEXT}'"])
    assert encoder.eos_token_id not in ids
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == f"EOS = '{END_OF_TEXT}'"


def test_training_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), 320, tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        copy_tokenizer(str(tmp_path), tmp_path / "copy")
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        open_encoder(tmp_path, "somewhere")


def test_a_tokenizer_that_cannot_be_read_or_has_no_end_is_refused(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(str(folder), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<not there>"}))
    with pytest.raises(ConfigError, match=r"eos_token.*<not there>"):
        open_encoder(tmp_path, "somewhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="readable"):
        open_encoder(tmp_path, "somewhere")
