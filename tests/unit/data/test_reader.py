"""A batch is what the pack plan says, with labels inside pieces only; damaged files are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from farspan.batch import IGNORED_LABEL
from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus
from farspan.data.reader import Corpus, Reader, open_corpus
from farspan.errors import CorruptDataError, NotFoundError
from farspan.storage.publish import publish_folder


@pytest.fixture
def built(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number:02}.py").write_text("".join(f"x{number}_{line} = {line}\n" for line in range(number + 1)))
    config = CorpusConfig(sources=[str(texts)], output=str(tmp_path / "corpus"), vocab_size=300, shard_tokens=1024)
    build_corpus(config, lambda _: None)
    return tmp_path / "corpus"


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Corpus:
    return open_corpus(str(built), tmp_path / "cache")


def test_a_batch_equals_its_documents_read_one_by_one(corpus: Corpus) -> None:
    reader = Reader(corpus, 257, seed=5)
    for index in (0, 1, 7, 1000):
        batch, pieces = reader.batch(index), reader.plan.sequence(index)
        assert batch.num_tokens == 257
        assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.positions_T.dtype == torch.int64
        assert batch.bounds[0] == 0
        assert batch.bounds[-1] == 257
        assert batch.sample_ids == tuple(piece.document for piece in pieces)
        for piece, start, stop in zip(pieces, batch.bounds, batch.bounds[1:], strict=False):
            tokens = torch.from_numpy(corpus.tokens(piece.document).astype("int64"))[piece.start : piece.stop]
            assert torch.equal(batch.tokens_T[start:stop], tokens)
            assert torch.equal(batch.labels_T[start : stop - 1], tokens[1:])
            assert batch.labels_T[stop - 1] == IGNORED_LABEL
            assert torch.equal(batch.positions_T[start:stop], torch.arange(stop - start))


def test_only_the_last_token_of_each_piece_has_no_label(corpus: Corpus) -> None:
    batch = Reader(corpus, 300, seed=0).batch(3)
    ignored = (batch.labels_T == IGNORED_LABEL).nonzero().flatten().tolist()
    assert ignored == [bound - 1 for bound in batch.bounds[1:]]


def test_two_readers_give_the_same_batches_whatever_was_asked_before(built: Path, tmp_path: Path) -> None:
    one = Reader(open_corpus(str(built), tmp_path / "a"), 128, seed=9)
    other = Reader(open_corpus(str(built), tmp_path / "b"), 128, seed=9)
    for index in range(30):
        one.batch(index)
    for index in (29, 0, 15):
        assert torch.equal(one.batch(index).tokens_T, other.batch(index).tokens_T)
    assert not torch.equal(one.batch(0).tokens_T, Reader(one.corpus, 128, seed=10).batch(0).tokens_T)


def test_a_corpus_shorter_than_one_sequence_fills_it_by_repeating(corpus: Corpus) -> None:
    tokens = corpus.manifest.tokens
    batch = Reader(corpus, 3 * tokens, seed=0).batch(0)
    assert batch.num_tokens == 3 * tokens
    counts = torch.bincount(batch.tokens_T, minlength=corpus.vocab_size)
    once = torch.bincount(batch.tokens_T[:tokens], minlength=corpus.vocab_size)
    assert torch.equal(counts, 3 * once)


def test_no_token_lies_outside_the_vocabulary(corpus: Corpus) -> None:
    for document in range(corpus.document_lengths.size):
        assert int(corpus.tokens(document).max()) < corpus.vocab_size


def test_what_lies_outside_a_document_is_refused(corpus: Corpus) -> None:
    length = int(corpus.document_lengths[0])
    for document, start, stop in [(-1, 0, 1), (10**6, 0, 1), (0, 0, length + 1), (0, 2, 1), (0, -1, 1)]:
        with pytest.raises(IndexError):
            corpus.tokens(document, start, stop)


def test_a_changed_byte_of_a_shard_is_refused_by_name_when_it_is_read(built: Path, tmp_path: Path) -> None:
    shard = built / "shards" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    corpus = open_corpus(str(built), tmp_path / "cache")
    with pytest.raises(CorruptDataError, match=r"shards/00001\.arrow.*farspan data build"):
        Reader(corpus, corpus.manifest.tokens, seed=0).batch(0)
    assert corpus.tokens(0).size > 0


def test_a_torn_or_missing_shard_is_refused_when_the_corpus_is_opened(built: Path, tmp_path: Path) -> None:
    shard = built / "shards" / "00000.arrow"
    os.truncate(shard, 100)
    with pytest.raises(CorruptDataError, match=r"shards/00000\.arrow has 100 bytes"):
        open_corpus(str(built), tmp_path / "cache")
    shard.unlink()
    with pytest.raises(CorruptDataError, match=r"shards/00000\.arrow is missing"):
        open_corpus(str(built), tmp_path / "cache")


@pytest.mark.parametrize("name", ["manifest.json", "documents.arrow", "tokenizer/tokenizer.json"])
def test_a_changed_manifest_index_or_tokenizer_is_refused_when_the_corpus_is_opened(
    name: str, built: Path, tmp_path: Path
) -> None:
    data = bytearray((built / name).read_bytes())
    data[len(data) // 2] ^= 1
    (built / name).write_bytes(data)
    with pytest.raises(CorruptDataError, match=name):
        open_corpus(str(built), tmp_path / "cache")


def test_a_missing_corpus_is_not_found_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="farspan data build"):
        open_corpus(str(tmp_path / "nowhere"), tmp_path / "cache")


def test_a_published_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    publish_folder(tmp_path / "model", str(tmp_path / "published"))
    with pytest.raises(NotFoundError, match="is not a corpus"):
        open_corpus(str(tmp_path / "published"), tmp_path / "cache")
