"""Compiled kernels are made once, and never waited for without end."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.kernels import build
from farspan.kernels.build import build_library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@needs_compiler
def test_processes_that_want_the_library_at_once_compile_it_once(tmp_path) -> None:
    counting = tmp_path / "bin" / "g++"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {shutil.which("g++")} "$@"\n')
    counting.chmod(0o755)
    small = _small_source(tmp_path)
    script = (
        "from pathlib import Path; from farspan.kernels.build import build_library;"
        f"print(build_library(Path({str(tmp_path / 'cache')!r}), Path({str(small)!r})))"
    )
    environment = {"PATH": f"{counting.parent}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    assert (tmp_path / "runs").read_text().splitlines() == ["run"]


@needs_compiler
def test_a_lock_that_is_never_released_is_waited_for_until_the_deadline_only(tmp_path) -> None:
    source = _small_source(tmp_path)
    library = build_library(tmp_path, source)
    lock = library.with_suffix(".lock")
    library.unlink()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ImportError, match="another process still compiles"):
            build_library(tmp_path, source, deadline_s=0.2)
    assert build_library(tmp_path, source) == library


@needs_compiler
def test_a_source_that_does_not_compile_says_why_and_leaves_nothing(tmp_path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( { return 0; }\n")
    with pytest.raises(ImportError, match=r"cannot compile broken\.cpp.*error"):
        build_library(tmp_path / "cache", source)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_machine_without_a_compiler_and_a_folder_that_cannot_be_written_say_so(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    if shutil.which("g++"):
        with pytest.raises(ImportError, match="cannot be written"):
            build_library(tmp_path / "file" / "cache", _small_source(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match="no C\\+\\+ compiler"):
        build_library(tmp_path, _small_source(tmp_path))


def _small_source(folder: Path) -> Path:
    source = folder / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source
