"""One question to a process of its own: nobody inherits another's allocator, and what it held goes with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from farspan.errors import ClusterError

_END_S = 30.0


@contextmanager
def apart(answer: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[tuple[BaseProcess, Connection]]:
    """(process, our end of its pipe) of `answer(pipe, *arguments)`. The process has ended afterwards."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(answer, theirs, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        # Whoever does not wait for the answer any more does not wait for its end either.
        process.kill()
        process.join(timeout=_END_S)
        ours.close()


def ask_apart(answer: Callable[..., None], arguments: tuple[Any, ...], what: str, deadline_s: float) -> Any:
    """What `answer(pipe, *arguments)` sends through its pipe, once. The process has ended when this returns.

    Raises:
        ClusterError: `what` died, or gave no answer until the deadline.
    """
    with apart(answer, arguments) as (process, pipe):
        found = hear(process, pipe, what, deadline_s)
        process.join(timeout=_END_S)
        return found


def hear(process: BaseProcess, pipe: Connection, what: str, deadline_s: float) -> Any:
    """The next thing that a process apart sends.

    Raises:
        ClusterError: `what` died, or said nothing until the deadline.
    """
    try:
        if not pipe.poll(deadline_s):
            raise ClusterError(f"{what} gave no answer in {deadline_s:.0f} s")
        return pipe.recv()
    except EOFError:
        process.join(timeout=_END_S)
        raise ClusterError(f"{what} died with code {process.exitcode}") from None


def _answer(answer: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    answer(pipe, *arguments)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its child, which may have long to compute."""
    parent = parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os._exit(1)
