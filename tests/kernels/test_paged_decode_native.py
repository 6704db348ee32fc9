"""The compiled CPU kernel over pages: right, made once, and never waited for without end."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.support.paged_cases import CASES, Case, assert_close, make

from farspan.kernels.paged_decode import build
from farspan.kernels.paged_decode.build import SOURCE, build_library
from farspan.kernels.paged_decode.native import load_native
from farspan.kernels.paged_decode.reference import attend_pages_reference

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case((700, 3, 0, 257, 64), heads=12, groups=3, queries=8)], ids=str)
def test_the_compiled_kernel_equals_the_reference_and_never_reads_hidden_slots(
    case, dtype, num_threads, threads
) -> None:
    threads(num_threads)
    inputs, rule = make(case, "cpu", dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    want = attend_pages_reference(*(x.float() if x.is_floating_point() else x for x in inputs), **rule)
    got = load_native()(*inputs, **rule)
    assert_close(tolerance, got, (want[0].to(dtype), want[1]))


@needs_compiler
def test_the_number_of_threads_moves_no_more_than_rounding_and_repeats_its_bits(threads) -> None:
    inputs, rule = make(Case((900, 40, 333)), "cpu", torch.float32)
    runs = {}
    for count in (1, 2, 5):
        threads(count)
        runs[count] = [load_native()(*inputs, **rule) for _ in range(3)]
        for again in runs[count][1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[count][0], strict=True))
    for count in (2, 5):
        assert_close(1e-6, runs[count][0], runs[1][0])


@needs_compiler
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    inputs, rule = make(Case((300, 40)), "cpu", torch.float32)
    inputs[0].mul_(200.0)
    assert_close(1e-5, load_native()(*inputs, **rule), attend_pages_reference(*inputs, **rule))


@needs_compiler
def test_processes_that_want_the_library_at_once_compile_it_once(tmp_path) -> None:
    counting = tmp_path / "bin" / "g++"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nexec {shutil.which("g++")} "$@"\n')
    counting.chmod(0o755)
    small = _small_source(tmp_path)
    script = (
        "from pathlib import Path; from farspan.kernels.paged_decode.build import build_library;"
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
            build_library(tmp_path / "file" / "cache")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match="no C\\+\\+ compiler"):
        build_library(tmp_path)


def test_the_source_is_shipped_beside_its_builder() -> None:
    assert SOURCE.is_file()
    assert SOURCE.parent == Path(build.__file__).parent


def _small_source(folder: Path) -> Path:
    source = folder / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source
