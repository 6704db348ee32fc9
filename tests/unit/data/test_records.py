"""Records of every kind of file come in order, by name, and none is lost without being counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.s3 import S3Bucket
from tokenizers import Tokenizer

from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus
from farspan.data.manifest import CorpusManifest
from farspan.data.mixture import split_bounds
from farspan.data.reader import open_corpus
from farspan.errors import ConfigError, CorruptDataError, FarspanError

LINES = [{"text": f"line {number} of {'many ' * number}"} for number in range(30)]


def _build(output: Path | str, *sources: object, **settings: object) -> CorpusManifest:
    config = {"vocab_size": 400, "shard_tokens": 1024, "pattern": "*", **settings}
    return build_corpus(CorpusConfig(sources=list(sources), output=str(output), **config), lambda _: None)


def _texts(output: Path | str, cache: Path) -> list[str]:
    corpus = open_corpus(str(output), cache)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_folder / "tokenizer.json"))
    rows = [corpus.tokens(document)[:-1].tolist() for document in range(corpus.document_lengths.size)]
    return [tokenizer.decode(row, skip_special_tokens=False) for row in rows]


def _jsonl(lines: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """The same thirty texts as JSON lines, packed twice, and as Parquet."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(_jsonl(LINES))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl(LINES)))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as sink:
        sink.write(_jsonl(LINES))
    pq.write_table(pa.table({"text": [line["text"] for line in LINES], "id": range(30)}), folder / "d.parquet")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"a whole text"))
    return folder


def test_every_kind_of_file_gives_the_same_texts_in_their_order(shelf: Path, tmp_path: Path) -> None:
    manifest = _build(tmp_path / "corpus", str(shelf))
    texts = [line["text"] for line in LINES]
    assert _texts(tmp_path / "corpus", tmp_path / "cache") == [*texts * 4, "a whole text"]
    assert manifest.num_skipped == 0
    assert [(share.path, share.documents) for share in manifest.sources] == [(str(shelf), 121)]


def test_records_are_read_from_s3_to_s3(shelf: Path, s3: S3Bucket, tmp_path: Path) -> None:
    for file in shelf.iterdir():
        s3.put(f"shelf/{file.name}", file.read_bytes())
    _build(f"{s3.uri}/corpus", f"{s3.uri}/shelf")
    _build(tmp_path / "corpus", str(shelf))
    assert _texts(f"{s3.uri}/corpus", tmp_path / "a") == _texts(tmp_path / "corpus", tmp_path / "b")


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "good text"}).encode()
    lines = [
        good,
        b"{not json",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": ""}',
        b"\xff\xfe",
        b'{"text": "\\ud800"}',
        b"[]",
    ]
    file.write_bytes(b"\n".join([*lines, b"", good]))
    manifest = _build(tmp_path / "corpus", str(file))
    assert {entry.reason: [name.rpartition(":")[2] for name in entry.examples] for entry in manifest.skipped} == {
        "not a JSON object": ["2", "8"],
        "no text in text_field": ["3", "4"],
        "empty": ["5"],
        "not UTF-8": ["6", "7"],
    }
    assert manifest.documents == 2
    with pytest.raises(
        CorruptDataError, match=r"bad\.jsonl:2: not a JSON object; correct the record or set on_bad=skip"
    ):
        _build(tmp_path / "other", str(file), on_bad="fail", tokenizer=str(tmp_path / "corpus" / "tokenizer"))


def test_a_torn_file_is_never_taken_for_a_whole_one(shelf: Path, tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "d.parquet"):
        torn = tmp_path / name
        torn.write_bytes((shelf / name).read_bytes()[:-40])
        with pytest.raises(CorruptDataError, match=name):
            _build(tmp_path / "corpus", str(torn))
        assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"text_field": "txt"}, ConfigError, "did you mean 'text'"),
        ({"format": "chats"}, ConfigError, "did you mean 'chat'"),
        ({"format": "chat"}, ConfigError, "tokenizer=FOLDER"),
        ({"on_bad": "ignore"}, ConfigError, "skip, fail"),
        ({"split_tokens": 3}, ConfigError, "split_tokens=4"),
        ({"upsample": {"factor": 1.234}}, ConfigError, "multiple of 0.01"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(
    settings: dict[str, object], kind: type[FarspanError], message: str, shelf: Path, tmp_path: Path
) -> None:
    from farspan.config.load import load_config

    overrides = [f"sources=['{shelf}/d.parquet']", f"output={tmp_path / 'corpus'}", "vocab_size=400"]
    for name, value in settings.items():
        overrides += (
            [f"{name}.{key}={item}" for key, item in value.items()] if isinstance(value, dict) else [f"{name}={value}"]
        )
    with pytest.raises(kind, match=message):
        build_corpus(load_config(CorpusConfig, None, overrides), lambda _: None)


@pytest.mark.parametrize(
    "source",
    [{"path": "a"}, {"path": "a", "weight": 0}, {"path": "a", "weight": "2"}, {"path": "a", "weight": 1, "x": 2}, 5],
)
def test_a_source_that_says_something_else_is_refused(source: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sources"):
        _build(tmp_path / "corpus", source)


@given(st.integers(1, 10_000), st.integers(4, 500))
def test_a_cut_text_is_whole_again_when_its_parts_are_joined(num_tokens: int, split_tokens: int) -> None:
    bounds = split_bounds(num_tokens, split_tokens)
    sizes = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, num_tokens)
    assert sizes.max() <= split_tokens
    assert sizes.max() - sizes.min() <= 1
    assert len(sizes) == -(-num_tokens // split_tokens)


def test_cut_documents_hold_the_tokens_of_whole_ones(shelf: Path, tmp_path: Path) -> None:
    whole = _build(tmp_path / "whole", str(shelf / "a.jsonl"))
    cut = _build(tmp_path / "cut", str(shelf / "a.jsonl"), split_tokens=10)
    one, other = open_corpus(str(tmp_path / "whole"), tmp_path), open_corpus(str(tmp_path / "cut"), tmp_path)
    tokens = [np.concatenate([c.tokens(d) for d in range(c.document_lengths.size)]) for c in (one, other)]
    assert np.array_equal(*tokens)
    assert other.document_lengths.max() <= 10
    assert (cut.rule.split_tokens, cut.rule.split) == (10, int((one.document_lengths > 10).sum()))
    assert whole.rule.split == 0


def test_at_most_max_documents_records_are_read(shelf: Path, tmp_path: Path) -> None:
    manifest = _build(tmp_path / "corpus", str(shelf), max_documents=37)
    assert manifest.documents + manifest.num_skipped == 37
