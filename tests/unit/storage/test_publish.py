"""Publishing shows all of a folder or nothing of it, also when the disk is full or the process is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.s3 import S3Bucket

from farspan.errors import CorruptDataError, NotFoundError, UnreachableError
from farspan.storage import staging
from farspan.storage.manifest import MANIFEST_NAME, FileEntry, FolderManifest
from farspan.storage.publish import fetch_folder, is_published, publish_folder

_DEADLINE_S = 60.0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "shards").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "shards" / "0.bin").write_bytes(os.urandom(50_000))
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    places: dict[str, Callable[[], str]] = {
        "local": lambda: str(tmp_path / "shelf" / "model"),
        "s3": lambda: f"{request.getfixturevalue('s3').uri}/shelf/model",
    }
    return places[request.param]()


def _contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_published_folder_is_fetched_byte_for_byte(source: Path, uri: str, tmp_path: Path) -> None:
    assert not is_published(uri)
    manifest = publish_folder(source, uri)
    assert is_published(uri)
    assert [entry.path for entry in manifest.files] == ["config.json", "empty", "shards/0.bin"]
    assert _contents(fetch_folder(uri, tmp_path / "cache")) == _contents(source)


def test_publishing_again_replaces_the_folder_whole(source: Path, uri: str, tmp_path: Path) -> None:
    publish_folder(source, uri)
    (source / "config.json").write_text('{"newer": true}')
    (source / "empty").unlink()
    publish_folder(source, uri)
    assert _contents(fetch_folder(uri, tmp_path / "cache")) == _contents(source)


def test_a_frozen_source_is_published_like_any_other(source: Path, uri: str, tmp_path: Path) -> None:
    publish_folder(source, uri, frozen=True)
    assert _contents(fetch_folder(uri, tmp_path / "cache")) == _contents(source)


def test_a_fetched_folder_can_be_published_again(source: Path, uri: str, tmp_path: Path) -> None:
    publish_folder(source, uri)
    fetched = fetch_folder(uri, tmp_path / "cache")
    again = publish_folder(fetched, str(tmp_path / "again"))
    assert again == publish_folder(source, uri)


def test_nothing_published_is_not_found_with_the_way_out(uri: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="publish again"):
        fetch_folder(uri, tmp_path / "cache")
    with pytest.raises(NotFoundError, match="check the path"):
        fetch_folder(uri, tmp_path / "cache", require_manifest=False)


def test_a_source_without_files_is_refused(tmp_path: Path, uri: str) -> None:
    (tmp_path / "nothing" / "here").mkdir(parents=True)
    with pytest.raises(NotFoundError, match="holds no file"):
        publish_folder(tmp_path / "nothing", uri)
    assert not is_published(uri)


def test_a_local_folder_is_fetched_in_place(source: Path, tmp_path: Path) -> None:
    publish_folder(source, str(tmp_path / "model"))
    assert fetch_folder(str(tmp_path / "model"), tmp_path / "cache") == tmp_path / "model"
    assert not (tmp_path / "cache").exists()


def test_a_changed_byte_of_a_local_folder_is_named(source: Path, tmp_path: Path) -> None:
    publish_folder(source, str(tmp_path / "model"))
    shard = tmp_path / "model" / "shards" / "0.bin"
    data = bytearray(shard.read_bytes())
    data[777] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"shards/0\.bin is not the file that was published.*again"):
        fetch_folder(str(tmp_path / "model"), tmp_path / "cache")


def test_a_torn_or_missing_file_is_named_without_reading_contents(source: Path, tmp_path: Path) -> None:
    publish_folder(source, str(tmp_path / "model"))
    shard = tmp_path / "model" / "shards" / "0.bin"
    os.truncate(shard, 10)
    with pytest.raises(CorruptDataError, match=r"shards/0\.bin has 10 bytes instead of 50000"):
        fetch_folder(str(tmp_path / "model"), tmp_path / "cache", contents=False)
    shard.unlink()
    with pytest.raises(CorruptDataError, match=r"shards/0\.bin is missing"):
        fetch_folder(str(tmp_path / "model"), tmp_path / "cache", contents=False)


def test_a_changed_object_in_a_bucket_is_named_and_nothing_of_it_is_kept(
    source: Path, s3: S3Bucket, tmp_path: Path
) -> None:
    publish_folder(source, f"{s3.uri}/model")
    s3.put("model/config.json", b"[]")
    with pytest.raises(CorruptDataError, match=r"config\.json is not the file"):
        fetch_folder(f"{s3.uri}/model", tmp_path / "cache")
    assert _visible(tmp_path / "cache") == []


def test_a_damaged_copy_in_the_cache_is_fetched_again(source: Path, s3: S3Bucket, tmp_path: Path) -> None:
    publish_folder(source, f"{s3.uri}/model")
    copy = fetch_folder(f"{s3.uri}/model", tmp_path / "cache")
    s3.server.faults.plan("/model/shards")
    assert fetch_folder(f"{s3.uri}/model", tmp_path / "cache") == copy
    assert s3.server.faults.seen == 0
    (copy / "config.json").write_text("[]")
    assert _contents(fetch_folder(f"{s3.uri}/model", tmp_path / "cache")) == _contents(source)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"size": 2', '"size": 3'),
        lambda text: text.replace("config.json", "../config.json"),
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 99'),
    ],
)
def test_an_altered_manifest_is_refused(damage: Callable[[str], str], source: Path, tmp_path: Path) -> None:
    publish_folder(source, str(tmp_path / "model"))
    manifest = tmp_path / "model" / MANIFEST_NAME
    manifest.write_text(damage(manifest.read_text()))
    assert not is_published(str(tmp_path / "model"))
    with pytest.raises(CorruptDataError, match="publish the folder again"):
        fetch_folder(str(tmp_path / "model"), tmp_path / "cache")


def test_a_manifest_that_names_a_path_outside_the_folder_is_refused(s3: S3Bucket, tmp_path: Path) -> None:
    # A well-formed manifest, digest included, as an attacker would write it.
    forged = FolderManifest((FileEntry("../escaped", 1, "00"),))
    s3.put(f"model/{MANIFEST_NAME}", forged.to_json())
    with pytest.raises(CorruptDataError, match="leads out of the folder"):
        fetch_folder(f"{s3.uri}/model", tmp_path / "cache")
    assert _visible(tmp_path / "cache") == []


def test_a_folder_somebody_else_wrote_is_fetched_when_no_manifest_is_required(s3: S3Bucket, tmp_path: Path) -> None:
    s3.put("hub/config.json", b"{}")
    s3.put("hub/deep/weights.bin", b"123")
    with pytest.raises(NotFoundError):
        fetch_folder(f"{s3.uri}/hub", tmp_path / "cache")
    folder = fetch_folder(f"{s3.uri}/hub", tmp_path / "cache", require_manifest=False)
    assert _contents(folder) == {"config.json": b"{}", "deep/weights.bin": b"123"}
    s3.put("hub/config.json", b"[]")
    newer = fetch_folder(f"{s3.uri}/hub", tmp_path / "cache", require_manifest=False)
    assert _contents(newer)["config.json"] == b"[]"


def test_a_local_folder_somebody_else_wrote_is_taken_as_it_is(source: Path, tmp_path: Path) -> None:
    assert fetch_folder(str(source), tmp_path / "cache", require_manifest=False) == source


def test_a_folder_with_foreign_files_is_never_replaced(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UnreachableError, match=r"thesis\.tex.*choose another folder"):
        publish_folder(source, str(home))
    assert _visible(home) == ["thesis.tex"]
    publish_folder(source, str(tmp_path / "model"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UnreachableError, match=r"notes\.txt"):
        publish_folder(source, str(tmp_path / "model"))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_is_refused_not_skipped(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreachableError, match="is a link to a folder"):
        publish_folder(source, str(tmp_path / "model"))


def test_a_link_to_a_file_is_published_as_the_file(source: Path, tmp_path: Path) -> None:
    (source / "linked").symlink_to(source / "config.json")
    publish_folder(source, str(tmp_path / "model"), frozen=True)
    assert not (tmp_path / "model" / "linked").is_symlink()
    assert (tmp_path / "model" / "linked").read_text() == "{}"


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from farspan.errors import UnreachableError
from farspan.storage.publish import publish_folder
# The kernel refuses to write beyond this size, as it refuses on a disk that is full.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    publish_folder(Path(sys.argv[1]), sys.argv[2])
except UnreachableError as problem:
    print(problem)
    sys.exit(7)
"""


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=_DEADLINE_S, check=False,
    )  # fmt: skip


def test_a_disk_that_refuses_to_write_leaves_nothing_visible(source: Path, tmp_path: Path) -> None:
    answer = _run(_FULL_DISK, str(source), str(tmp_path / "shelf" / "model"))
    assert answer.returncode == 7, answer.stderr
    assert "publishing failed: File too large" in answer.stdout
    assert _visible(tmp_path / "shelf") == []


def test_a_disk_that_refuses_to_write_leaves_the_folder_that_was_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "shelf" / "model"
    publish_folder(source, str(target))
    before = _contents(target)
    (source / "config.json").write_text('{"newer": true}')
    assert _run(_FULL_DISK, str(source), str(target)).returncode == 7
    assert _visible(tmp_path / "shelf") == ["model"]
    assert _contents(fetch_folder(str(target), tmp_path / "cache")) == before


def test_a_full_disk_leaves_nothing_visible_and_keeps_what_was_there(
    source: Path, small_disk: Path, tmp_path: Path
) -> None:
    target = small_disk / "model"
    publish_folder(source, str(target))
    before = _contents(target)
    (source / "shards" / "1.bin").write_bytes(os.urandom(100_000))
    for place in (target, small_disk / "other"):
        with pytest.raises(UnreachableError, match=f"{os.strerror(errno.ENOSPC)}; free disk space"):
            publish_folder(source, str(place))
    assert _visible(small_disk) == ["model"]
    assert _contents(fetch_folder(str(target), tmp_path / "cache")) == before


def test_a_full_disk_under_the_cache_keeps_nothing_of_a_download(source: Path, s3: S3Bucket, small_disk: Path) -> None:
    (source / "shards" / "1.bin").write_bytes(os.urandom(200_000))
    publish_folder(source, f"{s3.uri}/model")
    with pytest.raises(UnreachableError, match="free disk space"):
        fetch_folder(f"{s3.uri}/model", small_disk)
    assert _visible(small_disk) == []


def test_many_processes_that_fetch_at_once_all_get_the_folder(source: Path, s3: S3Bucket, tmp_path: Path) -> None:
    publish_folder(source, f"{s3.uri}/model")
    with ThreadPoolExecutor(6) as pool:
        fetches = [pool.submit(fetch_folder, f"{s3.uri}/model", tmp_path / "cache") for _ in range(12)]
        folders = {fetch.result(_DEADLINE_S) for fetch in fetches}
    (folder,) = folders
    assert _contents(folder) == _contents(source)
    assert _visible(tmp_path / "cache") == [folder.name]


def test_many_publishers_to_one_place_leave_one_whole_folder(tmp_path: Path) -> None:
    sources = [tmp_path / f"source-{number}" for number in range(6)]
    for number, folder in enumerate(sources):
        folder.mkdir()
        (folder / "a").write_text(str(number))
        (folder / "b").write_text(str(number))
    shelf = tmp_path / "shelf"
    with ThreadPoolExecutor(6) as pool:
        for publishing in [pool.submit(publish_folder, folder, str(shelf / "model")) for folder in sources * 4]:
            publishing.result(_DEADLINE_S)
    assert _visible(shelf) == ["model"]
    assert len(set(_contents(fetch_folder(str(shelf / "model"), tmp_path / "cache")).values())) == 1


_KILLED = """
import signal, sys
from pathlib import Path
import farspan.storage.publish as publish
copied = []
place = publish._place
def place_and_stop(file, staging, name, frozen):
    if len(copied) == 2:
        print("two files are copied", flush=True)
        signal.pause()
    copied.append(name)
    return place(file, staging, name, frozen)
publish._place = place_and_stop
publish.publish_folder(Path(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_publisher_leaves_nothing_visible_and_the_next_one_cleans_up(source: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    code = textwrap.dedent(_KILLED)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(shelf / "model")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "two files are copied\n"
        process.send_signal(signal.SIGKILL)
        process.wait(_DEADLINE_S)
    (leftover,) = _visible(shelf)
    assert leftover.startswith(".publishing-model-")
    assert not is_published(str(shelf / "model"))
    with pytest.raises(NotFoundError):
        fetch_folder(str(shelf / "model"), tmp_path / "cache2")
    publish_folder(source, str(shelf / "model"))
    assert _visible(shelf) == ["model"]
    assert _contents(fetch_folder(str(shelf / "model"), tmp_path / "cache")) == _contents(source)


def test_a_publisher_at_work_is_not_cleaned_away(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staging.staging_folder(target) as other:
        publish_folder(source, str(target))
        assert other.is_dir()
        with staging.staging_folder(tmp_path / "model-2"):
            staging.remove_stale(target)
            assert len([name for name in _visible(tmp_path) if name.startswith(".publishing-")]) == 2
    assert _visible(tmp_path) == ["model", "source"]


def test_a_replacement_cut_in_two_is_put_back(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    publish_folder(source, str(target))
    before = _contents(target)
    # What a file system without an exchanging rename shows when the process dies between its two renames.
    target.rename(tmp_path / f".replaced-model-{'0' * 32}")
    assert _contents(fetch_folder(str(target), tmp_path / "cache")) == before
    target.rename(tmp_path / f".replaced-model-2-{'0' * 32}")
    assert not is_published(str(target))


def test_stepping_aside_replaces_like_an_exchange(source: Path, tmp_path: Path) -> None:
    target, fresh = tmp_path / "model", tmp_path / "fresh"
    publish_folder(source, str(target))
    fresh.mkdir()
    (fresh / "new").write_text("new")
    staging._step_aside(fresh, target)
    assert _contents(target) == {"new": b"new"}
    assert _visible(tmp_path) == ["model", "source"]


def test_replacing_exchanges_both_folders_in_one_step(tmp_path: Path) -> None:
    target, fresh = tmp_path / "model", tmp_path / "fresh"
    for folder, text in ((target, b"old"), (fresh, b"new")):
        folder.mkdir()
        (folder / "a").write_bytes(text)
    staging.reveal(fresh, target)
    assert _contents(target) == {"a": b"new"}
    # Only one exchanging rename can leave the old folder under the new one's name: no reader ever saw neither.
    assert _contents(fresh) == {"a": b"old"}


def test_an_upload_cut_short_is_not_there_and_can_be_repeated(source: Path, s3: S3Bucket, tmp_path: Path) -> None:
    uri = f"{s3.uri}/model"
    publish_folder(source, uri)
    (source / "config.json").write_text('{"newer": true}')
    s3.server.faults.plan("/model/shards/0.bin", unavailable=1000)
    with pytest.raises(UnreachableError, match="503"):
        publish_folder(source, uri)
    s3.server.faults.plan()
    assert s3.get("model/config.json") == b'{"newer": true}'
    assert not is_published(uri)
    with pytest.raises(NotFoundError):
        fetch_folder(uri, tmp_path / "cache")
    publish_folder(source, uri)
    assert _contents(fetch_folder(uri, tmp_path / "cache")) == _contents(source)


def test_replacing_in_a_bucket_removes_only_what_was_published(source: Path, s3: S3Bucket) -> None:
    publish_folder(source, f"{s3.uri}/model")
    s3.put("model/notes.txt", b"mine")
    (source / "empty").unlink()
    publish_folder(source, f"{s3.uri}/model")
    assert s3.keys() == ["model/config.json", f"model/{MANIFEST_NAME}", "model/notes.txt", "model/shards/0.bin"]


def test_a_manifest_is_the_same_bytes_for_the_same_content(source: Path, tmp_path: Path) -> None:
    first, second = publish_folder(source, str(tmp_path / "a")), publish_folder(source, str(tmp_path / "b"))
    assert first.to_json() == second.to_json()
    assert json.loads(first.to_json())["digest"] == first.digest
    assert FolderManifest.from_json("x", first.to_json()) == first
