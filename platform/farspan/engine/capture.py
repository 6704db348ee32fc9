"""A step that is launched again as a whole. On CUDA a graph: all its kernels by one call, whoever waits for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch

Step: TypeAlias = Callable[[], None]


class Capture(Protocol):
    def __call__(self, step: Step) -> Step:
        """What computes `step` again, from and into the tensors it used, whatever they hold by then.

        Raises what `step` raises, and RuntimeError where it cannot be captured.
        """
        ...


class CudaCapture:
    """Graphs of one device. They share their memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all: libraries keep their workspaces by stream, and those must outlive a capture.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # First what happens only once: kernels are compiled, workspaces allocated.
            step()
            # What waits for the device would break a capture in the middle; here it is only an error.
            with _waiting_is_an_error():
                step()
            torch.cuda.synchronize(self._device)
            # Other threads may go on: nobody else's work is captured.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
