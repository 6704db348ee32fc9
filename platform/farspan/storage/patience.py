"""An object store that does not answer for a while delays what is asked of it; it does not end it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from farspan.errors import UnreachableError
from farspan.storage.paths import LocalPlace, parse_uri

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 15.0


def patiently(
    act: Callable[[], Result], uri: str, deadline_s: float, waits_for: type[UnreachableError] = UnreachableError
) -> Result:
    """`act`, tried again while the object store of `uri` raises `waits_for`, for `deadline_s` in all.

    A local disk that is full or gone stays so: it is not waited for.

    Raises:
        UnreachableError: it did not answer until the deadline.
    """
    if isinstance(parse_uri(uri), LocalPlace):
        return act()
    ends, wait_s = time.monotonic() + deadline_s, _FIRST_WAIT_S
    while True:
        try:
            return act()
        except waits_for as problem:
            left_s = ends - time.monotonic()
            if wait_s > left_s:
                raise
            logger.warning("%s; asked again for another %.0f s", problem, left_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
