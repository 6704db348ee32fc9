"""Processes that were made to stand still do not stand for ever when whoever did it is killed.

A process killed by SIGKILL cannot let anybody go on, and who stands still cannot notice that it is gone. So a small
process beside it holds a pipe to it and knows who stands still; when the pipe ends it ends those that are left.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import psutil  # type: ignore[import-untyped]

from farspan.errors import ClusterError

_GRACE_S, _END_S = 10.0, 30.0


class Guardian:
    """Stops processes and lets them go on, and tells the process beside us which ones, before and after."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def stop(self, processes: Iterable[psutil.Process]) -> None:
        """Make processes stand still; those that have ended are passed over.

        Raises:
            ClusterError: the guardian died; nobody was stopped.
        """
        living = [process for process in processes if process.is_running()]
        self._tell("stop", living)
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def go_on(self, processes: Sequence[psutil.Process]) -> None:
        """Let processes go on, whatever became of the guardian."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._tell("go on", processes)

    @contextmanager
    def standing_still(self, processes: Sequence[psutil.Process]) -> Iterator[None]:
        """Inside, these processes stand still. Raises ClusterError as `stop` does."""
        try:
            self.stop(processes)
            yield
        finally:
            self.go_on(processes[::-1])

    def _tell(self, what: str, processes: Iterable[psutil.Process]) -> None:
        assert self._process.stdin is not None, "it was started with a pipe"
        # A number alone may belong to somebody else later. psutil has read when each began.
        known = [[process.pid, process.create_time()] for process in processes]
        try:
            self._process.stdin.write(json.dumps({what: known}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            code = self._process.wait(_END_S)
            raise ClusterError(f"the process that watches those that stand still died with code {code}") from None


@contextmanager
def guardian() -> Iterator[Guardian]:
    """A guardian for the length of a block; its process has ended afterwards."""
    # In a session of its own: what ends all processes of a terminal does not end it.
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield Guardian(process)
    finally:
        assert process.stdin is not None, "it was started with a pipe"
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait(_END_S)


def watch(lines: IO[str]) -> None:
    """What the guardian's process does: until the pipe ends it listens, then it ends who still stands still."""
    standing = dict[int, float]()
    for line in lines:
        # Its writer may have been killed in the middle of a line. Nobody is stopped before the line was written.
        with suppress(json.JSONDecodeError):
            told = json.loads(line)
            standing |= dict(told.get("stop", []))
            for pid, _ in told.get("go on", []):
                standing.pop(pid, None)
    _end(standing)


def _end(standing: dict[int, float]) -> None:
    left = list[psutil.Process]()
    for pid, began in standing.items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == began:
                # It is asked to end before it goes on, so that it does nothing else.
                process.terminate()
                process.resume()
                left.append(process)
    _, stubborn = psutil.wait_procs(left, timeout=_GRACE_S)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    watch(sys.stdin)
