"""A question to a process of its own ends with whoever asked it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from farspan.errors import ClusterError
from farspan.train.apart import ask_apart

DEADLINE_S = 60.0


def says_where_and_stays(pipe: Connection, told: str) -> None:
    Path(told).write_text(str(os.getpid()))
    time.sleep(3600)


def adds(pipe: Connection, a: int, b: int) -> None:
    pipe.send((a + b, os.getpid()))


def dies(pipe: Connection) -> None:
    os._exit(7)


def test_an_answer_comes_from_a_process_that_has_ended_by_then() -> None:
    total, pid = ask_apart(adds, (2, 3), "the sum", DEADLINE_S)
    assert total == 5
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_dies_is_told_of_with_its_code() -> None:
    with pytest.raises(ClusterError, match="the sum died with code 7"):
        ask_apart(dies, (), "the sum", DEADLINE_S)


def test_a_process_that_is_too_late_is_ended(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    started_s = time.monotonic()
    with pytest.raises(ClusterError, match="gave no answer in 5 s"):
        ask_apart(says_where_and_stays, (str(told),), "the sum", 5.0)
    assert time.monotonic() - started_s < DEADLINE_S
    # The import of this module may have taken all the time it had.
    assert not told.exists() or not Path(f"/proc/{told.read_text()}").exists()


def test_a_process_ends_when_whoever_asked_it_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    asks = (
        "from farspan.train.apart import ask_apart\n"
        f"from {__name__} import says_where_and_stays\n"
        "if __name__ == '__main__':\n"
        f"    ask_apart(says_where_and_stays, ({str(told)!r},), 'the sum', 3600.0)\n"
    )
    (tmp_path / "asks.py").write_text(asks)
    paths = os.pathsep.join([path or "." for path in sys.path])
    asking = subprocess.Popen([sys.executable, str(tmp_path / "asks.py")], env={**os.environ, "PYTHONPATH": paths})
    until_s = time.monotonic() + DEADLINE_S
    try:
        while not (told.exists() and told.read_text()):
            assert time.monotonic() < until_s, "the child never began"
            assert asking.poll() is None
            time.sleep(0.05)
    finally:
        asking.kill()
        asking.wait(DEADLINE_S)
    while Path(f"/proc/{told.read_text()}").exists():
        assert time.monotonic() < until_s, "the child outlived its parent"
        time.sleep(0.05)
