"""Small operations of torch between compiled calls, on one thread.

The threads of a team and those of torch's operations look for work for a while after they had some. Where both want the
same processors, one waits until the other sleeps: milliseconds, for what one thread does in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_one_thread() -> Iterator[None]:
    """What this thread asks torch for is computed by it alone. Costs less than a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
