"""A model on S3 is the model in a local folder: the same weights, the same tokens, and nothing but a model's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.s3 import S3Bucket
from tests.unit.serve.tiny_folder import write_tiny_model

from farspan.config.schema import EngineConfig
from farspan.engine.engine import Engine
from farspan.engine.request import SamplingParams
from farspan.errors import CheckpointError
from farspan.models.address import fetch_model, files_of_model
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.models.folder import open_model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(made)
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "farspan" / "models"


def put_folder(s3: S3Bucket, folder: Path, prefix: str) -> str:
    for file in folder.iterdir():
        s3.put(f"{prefix}/{file.name}", file.read_bytes())
    return f"{s3.uri}/{prefix}"


def test_a_model_on_s3_answers_as_the_local_folder_does(s3: S3Bucket, folder: Path, home: Path) -> None:
    copy = open_model_folder(put_folder(s3, folder, "tiny"))
    local, fetched = (load_causal_lm(place, torch.float64) for place in (folder, copy))
    want = local.state_dict()
    assert want.keys() == fetched.state_dict().keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in fetched.state_dict().items())
    # Of the machine's one copy, not a copy of each process.
    assert f"{copy / WEIGHTS}" in Path("/proc/self/maps").read_text(encoding="utf-8")
    prompt = load_tokenizer(copy)("def fibonacci(n):")["input_ids"]
    answers = []
    for model in (local, fetched):
        engine = Engine(model, EngineConfig(dtype="float64", kv_bytes=4 << 20))
        answers.append(engine.generate([prompt], SamplingParams(max_tokens=24))[0].tokens)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) >= 6
    # It is there once, and asked for no more than once.
    s3.server.faults.plan(WEIGHTS)
    assert open_model_folder(f"{s3.uri}/tiny") == copy
    assert s3.server.faults.seen == 0
    assert list(home.iterdir()) == [copy]


def test_weights_in_several_files_are_fetched_by_their_index(
    s3: S3Bucket, folder: Path, home: Path, tmp_path: Path
) -> None:
    load_causal_lm(folder, torch.float64).save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    uri = put_folder(s3, tmp_path / "cut", "cut")
    s3.put("cut/consolidated.safetensors", b"the same once more")
    copy = fetch_model(uri)
    assert len(list(copy.glob("*.safetensors"))) > 2
    assert not (copy / "consolidated.safetensors").exists()
    got, want = (load_causal_lm(place, torch.float64).state_dict() for place in (copy, folder))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_of_a_crowded_prefix_only_a_models_files_come_along(s3: S3Bucket, folder: Path, home: Path) -> None:
    uri = put_folder(s3, folder, "tiny")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "modeling.py", "checkpoint-5/config.json"):
        s3.put(f"tiny/{name}", b"never asked for")
    s3.put("tiny/additional_chat_templates/short.jinja", b"{{ messages }}")
    copy = fetch_model(uri)
    came = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    own = {file.name for file in folder.iterdir()}
    assert came - {"farspan_manifest.json"} == own | {"additional_chat_templates/short.jinja"}
    assert not any((fetch_model(uri, weights=False) / name).exists() for name in (WEIGHTS, INDEX))


def _no_index(path: str) -> bytes:
    raise AssertionError(f"{path} must not be read")


def _index(*files: object) -> Callable[[str], bytes]:
    return lambda path: json.dumps({"weight_map": {f"w{n}": file for n, file in enumerate(files)}}).encode()


@pytest.mark.parametrize(
    ("names", "read", "reason"),
    [
        (["config.json", "a.txt"], _no_index, r"has no model\.safetensors or .*, found a\.txt, config\.json; give"),
        ([*"abcdefgh"], _no_index, r"found a, b, c, d, e and 3 more"),
        (["config.json", "pytorch_model.bin"], _no_index, r"only pickled weights \(pytorch_model\.bin\).*convert them"),
        (["run.json", "model/config.json", f"model/{WEIGHTS}"], _no_index, r"give s3://bucket/run/model$"),
        ([WEIGHTS], _no_index, r"has no config\.json, found model\.safetensors"),
        (["config.json", INDEX], _index("a.safetensors"), r"weight file a\.safetensors is missing"),
        (["config.json", INDEX, "../b.safetensors"], _index("../b.safetensors"), r"names '\.\./b\.safetensors'"),
        (["config.json", INDEX, "w.bin"], _index("w.bin"), r"names 'w\.bin', which is no safetensors file"),
        (["config.json", INDEX], _index(), "names no file"),
        (["config.json", INDEX], _index(7), "is not an index"),
        (["config.json", INDEX], lambda path: b"[]", "is not an index"),
        (["config.json", INDEX], lambda path: b"\xff", "is not an index"),
        (["config.json", INDEX], lambda path: b"[" * 100_000, "is not an index"),
    ],
)
def test_what_is_no_model_is_refused_by_what_was_found(
    names: list[str], read: Callable[[str], bytes], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as refused:
        files_of_model("s3://bucket/run", names, read)
    assert len(str(refused.value).splitlines()) == 1
    assert refused.value.uri == "s3://bucket/run"


def test_a_folder_without_a_tokenizer_is_named_by_its_address(s3: S3Bucket, folder: Path, home: Path) -> None:
    s3.put("bare/config.json", (folder / "config.json").read_bytes())
    s3.put(f"bare/{WEIGHTS}", (folder / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="has no tokenizer") as refused:
        open_model_folder(f"{s3.uri}/bare")
    assert refused.value.uri == f"{s3.uri}/bare"
