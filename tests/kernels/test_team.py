"""The team of threads does every share once, level by level, and waits for nobody who has not come."""

import ctypes
import shutil
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

from farspan.kernels.team.native import load_team
from farspan.kernels.team.quiet import on_one_thread

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
AHEAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
TEAM = ctypes.CFUNCTYPE(
    None, WORK, AHEAD, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64
)
DEADLINE_S = 60.0


def run(work, counts, threads, ahead=None):
    """`work(level, index, thread)` for every share, `ahead(level, index)` for those that have to wait."""
    asked = AHEAD() if ahead is None else AHEAD(lambda _, *share: ahead(*share))
    numbers = (ctypes.c_int64 * len(counts))(*counts)
    TEAM(load_team())(WORK(lambda _, *share: work(*share)), asked, None, len(counts), numbers, threads)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("counts", [[1], [40], [3, 0, 7, 1, 20], [0, 0], [0, 2]], ids=str)
def test_every_share_is_done_once_and_no_level_begins_before_the_one_before_is_done(counts, threads) -> None:
    for _ in range(20):
        begun: list[tuple[int, int]] = []
        early: list[tuple[int, int]] = []
        who: set[int] = set()
        done = [0] * len(counts)
        lock = threading.Lock()

        def work(level, index, thread, begun=begun, early=early, who=who, done=done, lock=lock):
            with lock:
                begun.append((level, index))
                who.add(thread)
                if done[:level] != counts[:level]:
                    early.append((level, index))
            with lock:
                done[level] += 1

        run(work, counts, threads)
        assert sorted(begun) == [(level, index) for level, count in enumerate(counts) for index in range(count)]
        assert early == []
        assert who <= set(range(threads))


@needs_compiler
def test_a_thread_that_is_held_up_in_one_share_leaves_all_the_others_to_the_rest() -> None:
    others, released = [], []
    all_others = threading.Event()

    def work(_, index, thread):
        if index == 0:
            released.append(all_others.wait(DEADLINE_S))
            return
        others.append(thread)
        if len(others) == 30:
            all_others.set()

    run(work, [31], 2)
    assert released == [True]
    assert len(set(others)) == 1


@needs_compiler
def test_who_has_to_wait_for_a_level_can_ask_ahead_for_his_share_of_the_next() -> None:
    asked, done = [], []
    was_asked = threading.Event()

    def ahead(level, index):
        asked.append((level, index, list(done)))
        was_asked.set()

    def work(level, index, _):
        # Held up until the other thread has come to the next level.
        assert level or index or was_asked.wait(DEADLINE_S)
        done.append((level, index))

    run(work, [2, 2], 2, ahead)
    assert asked == [(1, 0, [(0, 1)])]
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert done.index((0, 0)) < done.index((1, 0))


@needs_compiler
def test_a_forked_process_that_has_none_of_the_threads_computes_alone() -> None:
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from tests.kernels.test_team import run
def count():
    done = []
    run(lambda level, index, thread: done.append(thread), [50, 50], 3)
    return done
assert len(count()) == 100
child = os.fork()
if child == 0:
    os._exit(0 if count() == [0] * 100 else 1)
assert os.waitpid(child, 0)[1] == 0
print("both")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert found.stdout.strip() == "both", found.stderr[-800:]


def test_operations_of_torch_are_on_one_thread_only_within_and_also_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with on_one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with suppress(ValueError), on_one_thread():
            int("whatever")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
