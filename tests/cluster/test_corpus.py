"""A corpus built by Ray Data equals the one built in one process, byte for byte, also after a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.local_ray import LocalRay
from tests.support.s3 import S3Bucket

from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus
from farspan.errors import ConfigError, CorruptDataError
from farspan.jobs.corpus import build_corpus_parallel


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    folder = tmp_path / "shelf"
    folder.mkdir()
    for number in range(9):
        lines = [json.dumps({"text": f"record {line} of {number}, {'again ' * (line % 17)}"}) for line in range(150)]
        lines[number] = "{torn"
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        (folder / f"{number}.txt").write_text(f"one whole text {number}\n" * (3 + number))
    return folder


def _config(shelf: Path, output: str, **settings: object) -> CorpusConfig:
    chosen = {"pattern": "*", "vocab_size": 400, "shard_tokens": 4096, **settings}
    return CorpusConfig(sources=[str(shelf)], output=output, **chosen)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_parallel_build_equals_the_build_in_one_process_byte_for_byte(
    ray_cluster: LocalRay, shelf: Path, tmp_path: Path
) -> None:
    one = build_corpus(_config(shelf, str(tmp_path / "one")), lambda _: None)
    many = build_corpus_parallel(_config(shelf, str(tmp_path / "many")), lambda _: None)
    assert one == many
    assert len(one.shards) > 2
    assert one.num_skipped == 9
    assert _contents(tmp_path / "one") == _contents(tmp_path / "many")


def test_a_parallel_build_of_conversations_to_s3_equals_the_build_in_one_process(
    ray_cluster: LocalRay, s3: S3Bucket, tmp_path: Path
) -> None:
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(200)]
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (tmp_path / "talks").mkdir()
    for part in range(2):
        (tmp_path / "talks" / f"{part}.jsonl").write_text("\n".join(lines[part::2]))
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    build_corpus(_plain(tmp_path), lambda _: None)
    settings: dict[str, object] = {
        "format": "chat",
        "tokenizer": str(tmp_path / "base" / "tokenizer"),
        "chat_template": str(tmp_path / "template.jinja"),
    }
    one = build_corpus(_config(tmp_path / "talks", str(tmp_path / "one"), **settings), lambda _: None)
    many = build_corpus_parallel(_config(tmp_path / "talks", f"{s3.uri}/many", **settings), lambda _: None)
    assert one == many


def _plain(folder: Path) -> CorpusConfig:
    (folder / "plain.txt").write_text("[user] 1? [assistant] 1!\n" * 20)
    return CorpusConfig(sources=[str(folder / "plain.txt")], output=str(folder / "base"), vocab_size=300)


def test_what_is_wrong_crosses_from_the_worker_in_one_sentence(
    ray_cluster: LocalRay, shelf: Path, tmp_path: Path
) -> None:
    config = _config(shelf, str(tmp_path / "one"))
    build_corpus(config, lambda _: None)
    tokenizer = str(tmp_path / "one" / "tokenizer")
    with pytest.raises(CorruptDataError, match=r"0\.jsonl\.gz:1: not a JSON object; correct the record"):
        build_corpus_parallel(_config(shelf, str(tmp_path / "b"), on_bad="fail", tokenizer=tokenizer), lambda _: None)
    with pytest.raises(ConfigError, match=r"of format=chat must be \.jsonl"):
        build_corpus_parallel(
            _config(shelf, str(tmp_path / "b"), format="chat", tokenizer=tokenizer, chat_template=__file__),
            lambda _: None,
        )
    assert not (tmp_path / "b").exists()


SCRIPT = """
import sys, time
from farspan.config.schema import CorpusConfig
from farspan.data.corpus import build_corpus

def slowly(progress):
    if progress.stage == "encoding":
        time.sleep(0.05)

build_corpus(CorpusConfig(sources=[sys.argv[1]], output=sys.argv[2], pattern="*", vocab_size=400, shard_tokens=4096),
             slowly)
"""


def test_a_killed_build_goes_on_from_its_finished_shards(ray_cluster: LocalRay, shelf: Path, tmp_path: Path) -> None:
    output, building = tmp_path / "killed", tmp_path / ".building-killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(shelf), str(output)])
    deadline = time.monotonic() + 120
    while not (building / "corpus" / "shards" / "00002.arrow").exists():
        assert process.poll() is None, "the build was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    kept = building / "corpus" / "shards" / "00000.arrow"
    inode = kept.stat().st_ino
    first: list[int] = []
    manifest = build_corpus_parallel(
        _config(shelf, str(output)), lambda told: first.append(told.tokens) if told.stage == "encoding" else None
    )
    assert first[0] > 2 * 4096, "what was finished is not encoded again"
    assert (output / "shards" / "00000.arrow").stat().st_ino == inode
    assert manifest == build_corpus(_config(shelf, str(tmp_path / "one")), lambda _: None)
    assert _contents(output) == _contents(tmp_path / "one")
    assert not building.exists()
