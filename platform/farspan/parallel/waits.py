"""How long a rank stood still for other ranks: communication that no computation hid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Waits:
    """Adds up the waits of one rank, each of them made inside `on`.

    On a CPU a wait is a call that returns late, and `now` says how late. On CUDA the call returns at once and the
    stream stands still: an event before and one after it say for how long, with a few microseconds more for each wait,
    which lie between any two events. Nobody waits for these events before `seconds` is asked for.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._waited_s = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # Events are used again: a step has thousands of waits.
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Count from here on."""
        self._waited_s = 0.0
        self._idle += self._spans
        self._spans = []

    def seconds(self) -> float:
        """Waited since `begin`. On CUDA the device has come through the last wait when this returns."""
        for before, after in self._spans:
            after.synchronize()
            self._waited_s += before.elapsed_time(after) / 1e3
        self._idle += self._spans
        self._spans = []
        return self._waited_s

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Around a wait, or a collective that is waited for at once, of tensors on `device`."""
        if device.type != "cuda":
            started = self._now()
            yield
            self._waited_s += self._now() - started
            return
        stream = torch.cuda.current_stream(device)
        before, after = self._idle.pop() if self._idle else _events()
        before.record(stream)
        yield
        after.record(stream)
        self._spans.append((before, after))


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
