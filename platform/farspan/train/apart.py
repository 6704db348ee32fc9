"""One question to a process of its own: nobody inherits another's allocator, and what it held goes with it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from farspan.errors import ClusterError

_END_S = 30.0


def ask_apart(answer: Callable[..., None], arguments: tuple[Any, ...], what: str, deadline_s: float) -> Any:
    """What `answer(pipe, *arguments)` sends through its pipe, once. The process has ended when this returns.

    Raises:
        ClusterError: `what` died, or gave no answer until the deadline.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(deadline_s):
            raise ClusterError(f"{what} gave no answer in {deadline_s:.0f} s")
        return ours.recv()
    except EOFError:
        process.join(timeout=_END_S)
        raise ClusterError(f"{what} died with code {process.exitcode}") from None
    finally:
        process.join(timeout=_END_S)
        process.kill()
        ours.close()
