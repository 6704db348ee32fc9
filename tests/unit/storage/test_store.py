"""One door: the same questions get the same answers from a local folder and from a real S3 server."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from tests.support.s3 import S3Bucket

from farspan.errors import ConfigError, CorruptDataError, NotFoundError, UnreachableError
from farspan.storage.door import open_store
from farspan.storage.s3 import PART_BYTES
from farspan.storage.store import Store


@pytest.fixture(params=["local", "file", "s3", "bare bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    places: dict[str, Callable[[], str]] = {
        "local": lambda: str(tmp_path / "a folder"),
        "file": lambda: (tmp_path / "a folder").as_uri(),
        "s3": lambda: f"{request.getfixturevalue('s3').uri}/a/prefix",
        "bare bucket": lambda: request.getfixturevalue("s3").uri,
    }
    return open_store(places[request.param]())


def test_bytes_come_back_as_they_were_written(store: Store) -> None:
    data = os.urandom(70_000)
    store.write_bytes("deep/er/file.bin", data)
    assert store.read_bytes("deep/er/file.bin") == data
    assert store.size("deep/er/file.bin") == len(data)
    store.write_bytes("deep/er/file.bin", b"new")
    assert store.read_bytes("deep/er/file.bin") == b"new"


def test_an_empty_file_is_a_file(store: Store) -> None:
    store.write_bytes("empty", b"")
    assert store.read_bytes("empty") == b""
    assert store.exists("empty")
    assert store.size("empty") == 0


def test_arrow_reads_a_table_through_the_door(store: Store, tmp_path: Path) -> None:
    table = pa.table({"tokens": pa.array([[1, 2], [3]], pa.list_(pa.uint32()))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    store.write_bytes("table.arrow", sink.getvalue().to_pybytes())
    with store.open_input("table.arrow") as source:
        assert pa.ipc.open_file(source).read_all().equals(table)


def test_a_listing_names_every_file_below_in_path_order(store: Store) -> None:
    for path, data in {"b": b"12", "a/y": b"1", "a/x/z": b"", "ab": b"123"}.items():
        store.write_bytes(path, data)
    assert [(info.path, info.size) for info in store.list()] == [("a/x/z", 0), ("a/y", 1), ("ab", 3), ("b", 2)]
    assert [info.path for info in store.list("a")] == ["a/x/z", "a/y"]
    assert [info.path for info in store.list("b")] == ["b"]
    assert store.list("nothing") == []


def test_a_file_of_several_parts_is_carried_both_ways(s3: S3Bucket, tmp_path: Path) -> None:
    store = open_store(f"{s3.uri}/prefix")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1024) * (2 * PART_BYTES // 1024 + 5))
    store.upload(source, "large")
    store.download("large", target)
    assert target.read_bytes() == source.read_bytes()


def test_what_is_deleted_is_gone_and_the_rest_stays(store: Store) -> None:
    for path in ("a/x", "a/y", "b"):
        store.write_bytes(path, b"1")
    store.delete("a/x")
    store.delete("a/x")
    assert [info.path for info in store.list()] == ["a/y", "b"]


def test_a_missing_file_is_not_found(store: Store, tmp_path: Path) -> None:
    store.write_bytes("here", b"1")
    assert not store.exists("gone")
    for ask in (
        lambda: store.read_bytes("gone"),
        lambda: store.open_input("gone"),
        lambda: store.size("gone"),
        lambda: store.download("gone", tmp_path / "target"),
    ):
        with pytest.raises(NotFoundError, match="check the path"):
            ask()


@pytest.mark.parametrize("path", ["../other", "/etc/passwd", "a/../../b", "", "a//b", "./a", "a\\b", "a/.."])
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str, store: Store) -> None:
    with pytest.raises(CorruptDataError, match="leads out"):
        store.read_bytes(path)
    with pytest.raises(CorruptDataError, match="leads out"):
        store.write_bytes(path, b"1")


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "http://host/x", "s3://", "s3:///x", "s3://b/../c", "file://host/x", "s3:/b/x", ""]
)
def test_an_address_that_is_neither_local_nor_s3_is_refused_with_the_legal_ones(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/prefix"):
        open_store(uri)


def test_a_missing_bucket_is_named_with_the_way_out(s3: S3Bucket) -> None:
    store = open_store("s3://no-such-bucket-here/prefix")
    for ask in (
        lambda: store.read_bytes("x"),
        store.list,
        lambda: store.write_bytes("x", b"1"),
        lambda: store.size("x"),
    ):
        with pytest.raises(UnreachableError, match=r"'no-such-bucket-here'.*no such bucket.*create the bucket"):
            ask()


def test_an_unreadable_bucket_is_named_with_the_way_out(s3: S3Bucket, tmp_path: Path) -> None:
    s3.put("prefix/x", b"1")
    s3.deny("s3:*")
    store = open_store(f"{s3.uri}/prefix")
    for ask in (
        lambda: store.read_bytes("x"),
        lambda: store.download("x", tmp_path / "x"),
        lambda: store.write_bytes("x", b"2"),
    ):
        with pytest.raises(UnreachableError, match=rf"'{s3.name}'.*access is denied \(403.*credentials"):
            ask()


def test_an_endpoint_where_nobody_listens_is_named(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        # Bound but not listening: every connection is refused, and nobody else can take the port.
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UnreachableError, match=rf"'{s3.name}'.*{endpoint} does not answer.*AWS_ENDPOINT_URL"):
            open_store(s3.uri).read_bytes("x")


def test_missing_credentials_are_named(s3: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnreachableError, match=r"no AWS credentials.*AWS_ACCESS_KEY_ID"):
        open_store(s3.uri).read_bytes("x")


def test_a_server_that_recovers_is_asked_again_until_it_answers(s3: S3Bucket) -> None:
    s3.put("x", b"survived")
    s3.server.faults.plan("/x", unavailable=2)
    assert open_store(s3.uri).read_bytes("x") == b"survived"
    assert s3.server.faults.unavailable == 0
    assert s3.server.faults.seen >= 3


def test_a_body_that_breaks_off_is_asked_for_again(s3: S3Bucket, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    s3.put("x", data)
    s3.server.faults.plan("/x", broken_bodies=1)
    assert open_store(s3.uri).read_bytes("x") == data
    s3.server.faults.plan("/x", broken_bodies=1)
    open_store(s3.uri).download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    assert s3.server.faults.broken_bodies == 0


def test_a_server_that_stays_down_is_given_up_after_the_last_attempt(s3: S3Bucket) -> None:
    s3.server.faults.plan("/x", unavailable=1000)
    with pytest.raises(UnreachableError, match=rf"'{s3.name}'.*503.*try again later"):
        open_store(s3.uri).read_bytes("x")
    # HEAD and the first GET, each with its bounded attempts.
    assert s3.server.faults.seen <= 20


def test_a_storage_error_keeps_its_fields_across_processes(s3: S3Bucket) -> None:
    with pytest.raises(NotFoundError) as caught:
        open_store(s3.uri).read_bytes("gone")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (type(again), again.uri, again.reason) == (NotFoundError, caught.value.uri, caught.value.reason)


def test_no_secret_is_ever_part_of_an_error(s3: S3Bucket) -> None:
    s3.deny("s3:*")
    with pytest.raises(UnreachableError) as caught:
        open_store(s3.uri).read_bytes("x")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_a_folder_without_permission_is_unreachable_not_missing(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"a file where a folder should be")
    with pytest.raises(UnreachableError, match="writing x failed"):
        open_store(str(tmp_path / "folder")).write_bytes("x", b"1")
