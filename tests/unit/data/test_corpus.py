"""A corpus holds what its sources hold, counts what it leaves out, and is the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tests.support.s3 import S3Bucket
from tokenizers import Tokenizer

from farspan.config.schema import CorpusConfig
from farspan.data.corpus import BuildProgress, build_corpus
from farspan.data.manifest import CorpusManifest
from farspan.data.reader import open_corpus
from farspan.data.sources import STDLIB, find_files
from farspan.errors import ConfigError, FarspanError, NotFoundError, UnreachableError


def _build(output: Path | str, *sources: Path | str, **settings: object) -> CorpusManifest:
    config = {"vocab_size": 400, "shard_tokens": 1024, **settings}
    return build_corpus(CorpusConfig(sources=list(map(str, sources)), output=str(output), **config), lambda _: None)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(12):
        (folder / f"{number:02}.py").write_text(f"def answer_{number}():\n    return {number}\n" * (5 + number))
    (folder / "deep" / "naïve.py").write_text("größe = 'ß'  # 日本\n" * 9, encoding="utf-8")
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_document_is_in_the_corpus_and_comes_back_exactly(texts: Path, tmp_path: Path) -> None:
    manifest = _build(tmp_path / "corpus", texts)
    corpus = open_corpus(str(tmp_path / "corpus"), tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_folder / "tokenizer.json"))
    documents = [corpus.tokens(document).tolist() for document in range(manifest.documents)]
    assert all(tokens[-1] == corpus.eos_token_id for tokens in documents)
    expected = [(texts / name).read_text(encoding="utf-8") for name in sorted(p for p in _contents(texts))]
    assert [tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in documents] == expected
    assert manifest.tokens == sum(map(len, documents)) == int(corpus.document_lengths.sum())
    assert len(manifest.shards) > 1
    assert all(shard.tokens >= 1024 for shard in manifest.shards[:-1])


def test_building_again_gives_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    assert _build(tmp_path / "a", texts) == _build(tmp_path / "b", texts)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    _build(tmp_path / "a", texts)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_what_is_left_out_is_counted_with_its_reason(texts: Path, tmp_path: Path) -> None:
    (texts / "latin.py").write_bytes("größe".encode("latin-1"))
    (texts / "empty.py").write_bytes(b"")
    (texts / "short.py").write_bytes(b"x")
    manifest = _build(tmp_path / "corpus", texts, min_tokens=5)
    assert {entry.reason: (entry.documents, entry.examples) for entry in manifest.skipped} == {
        "empty": (1, (f"{texts}/empty.py",)),
        "not UTF-8": (1, (f"{texts}/latin.py",)),
        "shorter than min_tokens": (1, (f"{texts}/short.py",)),
    }
    assert manifest.documents + manifest.num_skipped == len(list(texts.rglob("*.py")))


def test_progress_is_told_for_every_stage_and_ends_complete(texts: Path, tmp_path: Path) -> None:
    told: list[BuildProgress] = []
    config = CorpusConfig(sources=[str(texts)], output=str(tmp_path / "corpus"), vocab_size=400, shard_tokens=1024)
    manifest = build_corpus(config, told.append)
    assert list(dict.fromkeys(progress.stage for progress in told)) == ["training", "encoding", "publishing"]
    last = told[-1]
    assert (last.files, last.total_files, last.documents, last.tokens) == (13, 13, 13, manifest.tokens)


def test_a_part_of_the_standard_library_becomes_a_corpus(tmp_path: Path) -> None:
    manifest = _build(tmp_path / "corpus", STDLIB, max_documents=40, vocab_size=2000, shard_tokens=50_000)
    assert manifest.documents + manifest.num_skipped == 40
    assert manifest.tokens > 50_000
    corpus = open_corpus(str(tmp_path / "corpus"), tmp_path / "cache")
    first = find_files([STDLIB], "*.py")[0]
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_folder / "tokenizer.json"))
    assert tokenizer.decode(corpus.tokens(0)[:-1].tolist(), skip_special_tokens=False) == first.read().decode()


def test_the_standard_library_means_source_files_without_tests_and_packages() -> None:
    names = [document.name for document in find_files([STDLIB], "*.py")]
    assert names == sorted(names)
    assert {f"{STDLIB}/ast.py", f"{STDLIB}/json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    assert all(Path(sysconfig.get_paths()["stdlib"], name.removeprefix(f"{STDLIB}/")).is_file() for name in names)


def test_files_and_folders_are_taken_in_the_order_written_each_once(texts: Path) -> None:
    sources = [str(texts / "05.py"), str(texts), str(texts / "05.py")]
    names = [document.name.removeprefix(f"{texts}/") for document in find_files(sources, "*.py")]
    assert names[:2] == ["05.py", "00.py"]
    assert len(names) == len(set(names)) == 13


def test_a_corpus_is_built_from_s3_to_s3_and_read_back(texts: Path, s3: S3Bucket, tmp_path: Path) -> None:
    for path, data in _contents(texts).items():
        s3.put(f"texts/{path}", data)
    remote = _build(f"{s3.uri}/corpora/one", f"{s3.uri}/texts")
    local = _build(tmp_path / "corpus", texts)
    # Shards differ only in the names of the sources.
    assert (remote.tokens, remote.documents, remote.tokenizer_sha256) == (
        local.tokens, local.documents, local.tokenizer_sha256
    )  # fmt: skip
    far = open_corpus(f"{s3.uri}/corpora/one", tmp_path / "cache")
    near = open_corpus(str(tmp_path / "corpus"), tmp_path / "cache")
    for document in range(near.document_lengths.size):
        assert (far.tokens(document) == near.tokens(document)).all()
    assert (far.tokenizer_folder / "tokenizer.json").is_file()
    one = _build(tmp_path / "one", f"{s3.uri}/texts/05.py")
    assert one.documents == 1


def test_a_given_tokenizer_is_used_and_travels_with_the_corpus(texts: Path, tmp_path: Path) -> None:
    first = _build(tmp_path / "first", texts)
    second = _build(tmp_path / "second", texts / "05.py", tokenizer=str(tmp_path / "first" / "tokenizer"))
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert _contents(tmp_path / "second" / "tokenizer") == _contents(tmp_path / "first" / "tokenizer")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"sources": ["/no/such/folder"]}, NotFoundError, "correct `sources`"),
        ({"sources": ["s3x://bucket/a"]}, ConfigError, "s3://bucket/prefix"),
        ({"sources": []}, ConfigError, "sources"),
        ({"pattern": "*.nothing"}, ConfigError, r"pattern"),
        ({"tokenizer": "/no/such/tokenizer"}, NotFoundError, r"tokenizer\.json"),
        ({"min_tokens": 100_000}, ConfigError, r"13 shorter than min_tokens"),
        ({"vocab_size": 10}, ConfigError, "vocab_size=300"),
    ],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(
    settings: dict[str, object], kind: type[FarspanError], message: str, texts: Path, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    sources = settings.pop("sources", [str(texts)])
    assert isinstance(sources, list)
    with pytest.raises(kind, match=message):
        _build(shelf / "corpus", *sources, **settings)
    assert not shelf.exists() or os.listdir(shelf) == []


def test_a_place_with_foreign_files_is_refused_before_the_work_begins(texts: Path, tmp_path: Path) -> None:
    told: list[BuildProgress] = []
    with pytest.raises(UnreachableError, match="did not publish"):
        build_corpus(CorpusConfig(sources=[str(texts)], output=str(texts)), told.append)
    assert told == []


def test_a_source_that_cannot_be_read_stops_the_build(texts: Path, tmp_path: Path) -> None:
    (texts / "99.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="nothing is there"):
        _build(tmp_path / "corpus", texts)
    assert not (tmp_path / "corpus").exists()


def test_a_full_disk_leaves_no_corpus_and_nothing_beside_it(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="free disk space"):
        _build(small_disk / "corpus", STDLIB, max_documents=40)
    assert os.listdir(small_disk) == []


def test_another_process_builds_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    manifest = _build(tmp_path / "here", texts)
    code = (
        "import sys; from farspan.config.schema import CorpusConfig; from farspan.data.corpus import build_corpus\n"
        "config = CorpusConfig(sources=[sys.argv[1]], output=sys.argv[2], vocab_size=400, shard_tokens=1024)\n"
        "print(build_corpus(config, lambda _: None).tokens)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(texts), str(tmp_path / "there")],
        capture_output=True, text=True, timeout=60, env=environment, check=True,
    )  # fmt: skip
    assert int(answer.stdout) == manifest.tokens
    assert _contents(tmp_path / "there") == _contents(tmp_path / "here")
