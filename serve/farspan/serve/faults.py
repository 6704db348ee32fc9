"""What went wrong, as clients may know it."""

from __future__ import annotations

import asyncio
import re
import time

from grpc.aio import AioRpcError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from farspan.errors import ClusterError, EngineError, FarspanError, RequestError
from farspan.serve.shape import ApiError

LOST = (RayError, RayServeException, AioRpcError, RuntimeError)
"""What a call of a worker raises when it is gone, or the connection to it. RuntimeError: Serve's own, when a connection
ends before the worker has said whether it takes the call.
"""
_FIELD = re.compile("([a-z_]+) must ")
# By then one of the others has room, or Serve has put another worker in its place.
_RETRY_S = 5
# A timer goes by another clock than a deadline, and by whole milliseconds: it may end before it.
_CLOCKS_S = 0.02


def as_api_error(problem: FarspanError) -> ApiError:
    if isinstance(problem, RequestError):
        # The engine's rules begin with the field they are about.
        field = _FIELD.match(problem.reason)
        return ApiError(400, problem.reason, code="invalid_request", param=field[1] if field else None)
    if isinstance(problem, ClusterError | EngineError):
        return unavailable("the workers that should answer were lost, or are not there")
    return internal_error()


def internal_error() -> ApiError:
    """What a client may know about what we got wrong."""
    return ApiError(500, "the request could not be completed; try again", code="internal_error")


def unavailable(why: str) -> ApiError:
    """Nobody can answer now, and somebody will again."""
    return ApiError(503, f"{why}; try again in {_RETRY_S} s", code="unavailable", retry_after_s=_RETRY_S)


def crowded(most: int) -> ApiError:
    """So many requests are open that nobody looks at another one."""
    return unavailable(f"this endpoint already has {most} requests")


def too_late() -> ApiError:
    """The deadline has passed: a client's own, or the endpoint's for every request."""
    message = (
        "the answer was not complete before its deadline (deadline_s, but at most request_timeout_s of this endpoint); "
        "give it more time or ask for less"
    )
    return ApiError(504, message, code="deadline_exceeded", param="deadline_s")


def busy(after_s: int) -> ApiError:
    """The first token would come too late: waiting in line would be in vain."""
    message = f"too many requests are waiting for an answer to begin in time; try again in {after_s} s"
    return ApiError(429, message, code="overloaded", retry_after_s=after_s)


def being_cancelled() -> bool:
    """Whether a CancelledError is meant for the task that caught it: a call given up elsewhere raises one too."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def is_past(deadline_at_s: float | None) -> bool:
    """Whether what ended now ended at its deadline."""
    return deadline_at_s is not None and time.time() >= deadline_at_s - _CLOCKS_S
