"""Copies under way: on worker threads, or on CUDA streams.

A transfer keeps its tensors alive until it is over, so nobody else is given their memory in the meantime.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import torch
from torch import Tensor

from farspan.errors import TierError

_POLL_S = 50e-6


class Transfer(ABC):
    """One copy under way, which must be over `deadline_s` after it began."""

    def __init__(self, tier: str, what: str, deadline_s: float) -> None:
        self._tier, self._what, self._deadline_s = tier, what, deadline_s
        self._until = time.monotonic() + deadline_s

    @abstractmethod
    def done(self) -> bool:
        """Whether it is over, well or badly."""

    @abstractmethod
    def wait(self) -> None:
        """Whatever the caller computes next (on its current CUDA stream, where there is one) sees the copied bytes.

        Raises:
            TierError: it failed, or its deadline has passed.
            CorruptDataError: the bytes that came back are not the ones that were stored.
        """

    @abstractmethod
    def finish(self) -> None:
        """The copy is over when this returns; raises as `wait` does."""

    def _late(self) -> TierError:
        return TierError(self._tier, f"{self._what} did not end in {self._deadline_s:g} s; the device may be stuck")


class Finished(Transfer):
    """A copy that was over when it was asked for."""

    def __init__(self) -> None:
        super().__init__("", "", 0.0)

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def finish(self) -> None:
        return None


class ThreadTransfer(Transfer):
    """A copy made by a worker thread."""

    def __init__(self, future: Future[None], tier: str, what: str, deadline_s: float) -> None:
        super().__init__(tier, what, deadline_s)
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self.finish()

    def finish(self) -> None:
        try:
            self._future.result(timeout=max(0.0, self._until - time.monotonic()))
        except FutureTimeoutError:
            if not self._future.done():
                raise self._late() from None
            raise


class StreamTransfer(Transfer):
    """A copy queued on a CUDA stream."""

    def __init__(self, event: torch.cuda.Event, tensors: tuple[Tensor, ...], tier: str, what: str, deadline_s: float):
        super().__init__(tier, what, deadline_s)
        self._event = event
        self._tensors: tuple[Tensor, ...] = tensors

    def done(self) -> bool:
        over = self._event.query()
        if over:
            self._tensors = ()
        return over

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def finish(self) -> None:
        while not self.done():
            if time.monotonic() > self._until:
                raise self._late()
            time.sleep(_POLL_S)


class ThreadLane:
    """Worker threads that copy; jobs begin in the order they were given."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=f"farspan-{name}")

    def submit(self, job: Callable[[], None], what: str, deadline_s: float) -> Transfer:
        return ThreadTransfer(self._threads.submit(job), self._name, what, deadline_s)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


class StreamLane:
    """One CUDA stream per direction: storing and fetching use both halves of the bus."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self.device = name, device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def copy(
        self, target: Tensor, source: Tensor, after: Transfer, what: str, deadline_s: float, *, back: bool
    ) -> Transfer:
        """Copy once everything queued so far on the caller's stream, and `after`, is over."""
        stream = self._back if back else self._out
        # The source must have been computed, and whoever held the target's memory before must be through with it.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            after.wait()
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return StreamTransfer(event, (target, source), self._name, what, deadline_s)
