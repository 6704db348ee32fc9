"""What looks for secrets finds one where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.canary import ProcessWatch, files_with

SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


@pytest.mark.parametrize("where", ["command line", "environment"])
def test_a_word_in_a_process_is_seen_and_one_in_none_is_not(where: str) -> None:
    # Put together here, so that it stands in no process but the one that is meant to have it.
    word = "".join(("canary", "-in-a-process"))
    given = {"args": [*SLEEP, word]} if where == "command line" else {"args": SLEEP, "env": os.environ | {"X": word}}
    with subprocess.Popen(**given, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        watch, other = ProcessWatch([word]), ProcessWatch([word], in_environments=[])
        watch.look()
        other.look()
        process.communicate(b"")
    assert [where in seen for seen in watch.seen] == [True]
    assert bool(other.seen) == (where == "command line")
    assert os.readlink("/proc/self/ns/pid") in watch.namespaces
    assert ProcessWatch([word]).seen == set()


def test_a_process_whose_environment_cannot_be_read_is_judged_by_its_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word, read = "".join(("canary", "-of-another-user")), Path.read_bytes

    def refuse(file: Path) -> bytes:
        if file.name == "environ":
            raise PermissionError(file)
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with subprocess.Popen([*SLEEP, word], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        watch = ProcessWatch([word])
        watch.look()
        process.communicate(b"")
    assert ["command line" in seen for seen in watch.seen] == [True]


def test_a_word_in_a_file_is_found_in_its_bytes_and_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bytes").write_bytes(b"\xff\0a-canary\n")
    (tmp_path / "of-a-canary").touch()
    (tmp_path / "plain").write_text("nothing", encoding="ascii")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "bytes")
    assert files_with(["a-canary"], tmp_path) == {"in/bytes", "of-a-canary"}
