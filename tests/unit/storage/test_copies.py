"""A copy of a remote folder is made once, by one process at a time, and is what the place says it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.s3 import S3Bucket

from farspan.errors import CorruptDataError, NoAnswerError, NotFoundError, UnreachableError
from farspan.storage import s3 as s3_store
from farspan.storage.publish import fetch_folder, publish_folder
from farspan.storage.staging import one_at_a_time, staging_folder

_DEADLINE_S = 60.0


@pytest.fixture
def hub(s3: S3Bucket) -> str:
    """A folder that somebody else wrote."""
    s3.put("hub/config.json", b"{}")
    s3.put("hub/weights", os.urandom(50_000))
    return f"{s3.uri}/hub"


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_many_that_want_a_copy_at_once_ask_for_each_file_once(hub: str, s3: S3Bucket, tmp_path: Path) -> None:
    s3.server.faults.plan("/hub/weights")
    fetch_folder(hub, tmp_path / "alone", require_manifest=False)
    asked_alone = s3.server.faults.seen
    s3.server.faults.plan("/hub/weights")
    with ThreadPoolExecutor(8) as pool:
        fetches = [pool.submit(fetch_folder, hub, tmp_path / "cache", require_manifest=False) for _ in range(8)]
        (folder,) = {fetch.result(_DEADLINE_S) for fetch in fetches}
    assert s3.server.faults.seen == asked_alone
    assert (folder / "weights").read_bytes() == s3.get("hub/weights")
    assert _visible(tmp_path / "cache") == [folder.name]


_HOLDER = """
import signal, sys
from pathlib import Path
from farspan.storage.staging import one_at_a_time
with one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_who_waits_for_a_process_that_is_killed_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(target)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        entered = threading.Event()

        def enter() -> None:
            with one_at_a_time(target, _DEADLINE_S):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        holder.send_signal(signal.SIGKILL)
        holder.wait(_DEADLINE_S)
        assert entered.wait(_DEADLINE_S)
        waiting.join(_DEADLINE_S)
    assert _visible(tmp_path) == []


def test_who_waits_for_one_that_gets_nowhere_is_told(tmp_path: Path) -> None:
    target = tmp_path / "model"
    stalled = pytest.raises(UnreachableError, match=r"got nowhere for 0\.2 s; end that process")
    with one_at_a_time(target), stalled, one_at_a_time(target, 0.2):
        raise AssertionError("two at once")


def test_who_waits_for_one_that_gets_on_goes_on_waiting(tmp_path: Path) -> None:
    target, entered = tmp_path / "model", threading.Event()

    def enter() -> None:
        with one_at_a_time(target, 2):
            entered.set()

    waiting = threading.Thread(target=enter)
    with one_at_a_time(target), staging_folder(target) as staging:
        waiting.start()
        ends_s = time.monotonic() + 3
        with (staging / "weights").open("wb", buffering=0) as file:
            while time.monotonic() < ends_s:
                file.write(b"more")
                assert not entered.wait(0.02)
    assert entered.wait(_DEADLINE_S)
    waiting.join(_DEADLINE_S)


@pytest.mark.parametrize("checked_by", ["the client", "its ETag", "the manifest"])
def test_a_byte_that_changes_on_its_way_is_noticed(
    checked_by: str, hub: str, s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checked_by != "the client":
        # As older clients and other servers: no checksum of each answer.
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    if checked_by == "the manifest":
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "weights").write_bytes(s3.get("hub/weights"))
        publish_folder(tmp_path / "source", hub)
    s3.server.faults.plan("/hub/weights", altered_bodies=1)
    with pytest.raises(CorruptDataError, match=r"weights.*(\(checksum\)|(MD5|sha256) differs)"):
        fetch_folder(hub, tmp_path / "cache", require_manifest=False)
    assert s3.server.faults.altered_bodies == 0
    assert _visible(tmp_path / "cache") == []
    # Nothing of it stays: the next fetch is whole.
    folder = fetch_folder(hub, tmp_path / "cache", require_manifest=False)
    assert (folder / "weights").read_bytes() == s3.get("hub/weights")


@pytest.mark.parametrize("size", [2, 3])
def test_a_folder_that_is_replaced_while_it_is_fetched_is_not_kept(
    size: int, hub: str, s3: S3Bucket, tmp_path: Path
) -> None:
    # Encrypted with a key of the service: its ETag is no checksum.
    put = s3.server.client.put_object
    encrypted = {"Bucket": s3.name, "Key": "hub/config.json", "ServerSideEncryption": "aws:kms"}
    put(Body=b"{}", **encrypted)

    def replace(names: list[str], read: Callable[[str], bytes]) -> list[str]:
        put(Body=b"[" + b"]" * (size - 1), **encrypted)
        return names

    with pytest.raises(CorruptDataError, match=r"config\.json (was replaced|arrived with 3 bytes instead of 2)"):
        fetch_folder(hub, tmp_path / "cache", require_manifest=False, choose=replace)
    assert _visible(tmp_path / "cache") == []


def test_files_that_are_not_chosen_are_never_asked_for(hub: str, s3: S3Bucket, tmp_path: Path) -> None:
    s3.server.faults.plan("/hub/weights")
    folder = fetch_folder(
        hub, tmp_path / "cache", require_manifest=False, choose=lambda names, read: ["config.json", "../../etc/passwd"]
    )
    assert [path.name for path in folder.iterdir() if "manifest" not in path.name] == ["config.json"]
    assert s3.server.faults.seen == 0
    # Another choice is another copy.
    assert (fetch_folder(hub, tmp_path / "cache", require_manifest=False) / "weights").is_file()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself asks once, so that an outage outlasts it."""
    monkeypatch.setattr(s3_store, "ATTEMPTS", 1)
    monkeypatch.setattr(s3_store, "BODY_ATTEMPTS", 1)


@pytest.mark.usefixtures("hasty")
def test_a_store_that_does_not_answer_for_a_while_delays_a_copy(hub: str, s3: S3Bucket, tmp_path: Path) -> None:
    s3.server.faults.outage(0, requests=3)
    folder = fetch_folder(hub, tmp_path / "cache", require_manifest=False, patience_s=_DEADLINE_S)
    assert (s3.server.faults.refused, s3.server.faults.dropped) == (2, 1)
    assert (folder / "weights").read_bytes() == s3.get("hub/weights")


@pytest.mark.usefixtures("hasty")
def test_bodies_that_break_off_delay_a_copy(hub: str, s3: S3Bucket, tmp_path: Path) -> None:
    s3.server.faults.plan("/hub/weights", broken_bodies=1)
    folder = fetch_folder(hub, tmp_path / "cache", require_manifest=False, patience_s=_DEADLINE_S)
    assert s3.server.faults.broken_bodies == 0
    assert (folder / "weights").read_bytes() == s3.get("hub/weights")


@pytest.mark.usefixtures("hasty")
def test_a_store_that_stays_silent_is_given_up_in_time(hub: str, s3: S3Bucket, tmp_path: Path) -> None:
    s3.server.faults.outage(600)
    start_s = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"does not answer|answered 503"):
        fetch_folder(hub, tmp_path / "cache", require_manifest=False, patience_s=0.5)
    assert time.monotonic() - start_s < _DEADLINE_S


def test_what_no_waiting_mends_is_said_at_once(s3: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(uri: str) -> UnreachableError | NotFoundError:
        start_s = time.monotonic()
        with pytest.raises((UnreachableError, NotFoundError)) as caught:
            fetch_folder(uri, tmp_path / "cache", require_manifest=False, patience_s=3600)
        assert time.monotonic() - start_s < _DEADLINE_S
        return caught.value

    assert "no such bucket" in refused("s3://no-such-bucket-here/x").reason
    assert "no such folder" in refused(f"{s3.uri}/nothing").reason
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no AWS credentials" in refused(s3.uri).reason


def test_a_copy_that_does_not_fit_is_refused_before_it_begins(hub: str, s3: S3Bucket, small_disk: Path) -> None:
    s3.put("hub/more", bytes(200_000))
    s3.server.faults.plan("/hub/more")
    with pytest.raises(UnreachableError, match=r"needs 250,002 bytes, and [\d,]+ are left; free disk space"):
        fetch_folder(hub, small_disk, require_manifest=False)
    assert s3.server.faults.seen == 0
    assert _visible(small_disk) == []
