"""Who was made to stand still goes on, or ends, whatever becomes of who did it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import psutil
import pytest

from farspan.errors import ClusterError
from farspan.jobs.guardian import guardian, watch

DEADLINE_S = 60.0

# Says who it is, who watches, and who stands still, and then waits to be killed in the middle of a turn.
_BENCH = """
import subprocess, sys, psutil
from farspan.jobs.guardian import guardian
child = [sys.executable, "-c", "import signal; {habit}print('up', flush=True); signal.pause()"]
with guardian() as watching:
    started = [subprocess.Popen(child, stdout=subprocess.PIPE, start_new_session=True) for _ in range(2)]
    for one in started:
        one.stdout.readline()
    with watching.standing_still([psutil.Process(one.pid) for one in started]):
        print(watching.pid, *(one.pid for one in started), flush=True)
        sys.stdin.read()
"""
_STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@contextmanager
def waiting() -> Iterator[psutil.Process]:
    """A plain process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def becomes(process: psutil.Process, *states: str) -> bool:
    """Whether it is in one of these states before the deadline: the kernel stops a process when it next runs."""
    ends = time.monotonic() + DEADLINE_S
    while process.status() not in states:
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("habit", ["", _STUBBORN])
def test_who_stands_still_ends_when_who_stopped_it_is_killed(habit: str) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-c", _BENCH.format(habit=habit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert bench.stdout is not None
    pids = [int(word) for word in bench.stdout.readline().split()]
    watching, *standing = [psutil.Process(pid) for pid in pids]
    try:
        assert all(becomes(process, psutil.STATUS_STOPPED) for process in standing)
        bench.send_signal(signal.SIGKILL)
        bench.wait(DEADLINE_S)
        _, left = psutil.wait_procs([watching, *standing], timeout=DEADLINE_S)
        assert left == []
    finally:
        for process in (watching, *standing):
            if process.is_running():
                process.kill()
        bench.kill()
        bench.communicate(timeout=DEADLINE_S)


def test_who_stood_still_goes_on_and_the_guardian_ends() -> None:
    with waiting() as process:
        with guardian() as watching:
            watcher = psutil.Process(watching.pid)
            with watching.standing_still([process]):
                assert becomes(process, psutil.STATUS_STOPPED)
            assert becomes(process, psutil.STATUS_SLEEPING)
        assert not watcher.is_running()
        assert process.is_running()


def test_who_goes_on_is_left_alone_when_the_pipe_ends_and_so_is_another_process_of_that_number() -> None:
    with waiting() as process:
        known = f"[[{process.pid}, {process.create_time()!r}]]"
        watch(StringIO(f'{{"stop": {known}}}\n{{"go on": {known}}}\n{{"stop": [[{process.pid}, 1.5]]}}\n{{"stop": [['))
        assert process.is_running()
        assert process.status() != psutil.STATUS_ZOMBIE


def test_nobody_is_stopped_when_nobody_would_know() -> None:
    with waiting() as process, guardian() as watching:
        watcher = psutil.Process(watching.pid)
        watcher.kill()
        assert becomes(watcher, psutil.STATUS_ZOMBIE)
        with pytest.raises(ClusterError, match="died with code -9"):
            watching.stop([process])
        assert becomes(process, psutil.STATUS_SLEEPING)
