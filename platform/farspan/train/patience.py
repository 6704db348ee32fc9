"""An object store that does not answer for a while delays a checkpoint; it does not lose it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from farspan.errors import UnreachableError
from farspan.storage.paths import LocalPlace, parse_uri

Result = TypeVar("Result")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 15.0


def patiently(act: Callable[[], Result], uri: str, deadline_s: float) -> Result:
    """`act`, tried again while the object store of `uri` does not answer, for `deadline_s` in all.

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
        except UnreachableError:
            if time.monotonic() + wait_s > ends:
                raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
