"""When a rank runs out of memory, every rank puts what it holds at the last step boundary aside.

The others cannot be asked: they wait inside a collective for the rank that failed. So a small thread of each rank looks
at a store that all of them reach, and writes its rank's shards (weights and optimizer states do not change between two
step boundaries) while its main thread waits. The run is then started again with a plan that needs less memory, and goes
on from the very batch that did not fit.

`<output>/rescue/rank-00000/` holds shard.safetensors and state.json of one rank; it appears whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from farspan.errors import CorruptDataError, NotFoundError, OutOfMemoryError, TierFullError
from farspan.storage.door import open_store
from farspan.storage.paths import join_uri
from farspan.storage.publish import fetch_folder, publish_folder
from farspan.train.checkpoint import TrainState

_FOLDER, _SHARD, _STATE = "rescue", "shard.safetensors", "state.json"
_ASKED, _DEADLINE_S, _LOOK_EVERY_S = "rescue-asked", 120.0, 0.5


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether torch, Python or a memory tier said that memory did not suffice, on a device or beside it."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError | TierFullError):
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)


@contextmanager
def refused_without_memory(what: str) -> Iterator[None]:
    """Inside, before a run begins, memory that does not suffice is told as that of a step: a lower plan is needed.

    No rescue watches yet, and none is needed: nothing has changed.

    Raises:
        OutOfMemoryError: of this rank, before the first step.
    """
    try:
        yield
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemoryError(dist.get_rank(), 0, f"{what}: {first_line(problem)}") from problem


class NoticeBoard(Protocol):
    """A key-value store that every rank reaches: torch's `Store`."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass
class Rescue:
    """Keeps watch over one rank's steps; a context around them.

    `store` is reached by every rank, and no main thread holds it while it waits inside a collective.
    """

    output: str
    store: NoticeBoard
    rank: int
    num_ranks: int
    _state: TrainState | None = None
    _shards: Mapping[str, Tensor] = field(default_factory=dict)
    _step: int = 0
    _computed: torch.cuda.Event | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Rescue:
        self._thread = threading.Thread(target=self._watch, name="farspan-rescue", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        failed = error is not None and is_out_of_memory(error)
        if failed and self._shards:
            # What the failed step still holds would be missing for what is about to be written.
            traceback.clear_frames(trace)
            self.store.set(_ASKED, str(self.rank))
            self._wait_for_all()
        self._stop.set()
        self._thread.join(timeout=_DEADLINE_S)
        if failed:
            raise OutOfMemoryError(self.rank, self._step, first_line(error)) from error

    def at_boundary(self, state: TrainState, shards: Mapping[str, Tensor]) -> None:
        """A step ended, or the first begins: this is what would be put aside from now on.

        `shards` are this rank's own tensors by name, not copies: in the middle of a step a module holds gathered
        weights in their place.
        """
        with self._lock:
            self._state, self._step, self._shards = state, state.step + 1, shards
            device = _cuda_device(shards)
            if device is not None:
                self._computed = torch.cuda.Event()
                self._computed.record(torch.cuda.current_stream(device))

    def moving(self) -> None:
        """The optimizer begins to change the tensors: until the next boundary nothing can be put aside."""
        with self._lock:
            self._state = None

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            # Looked at once more after the end: this rank may have been stopped by the loss of the one that failed.
            stopped = self._stop.wait(_LOOK_EVERY_S)
            if self.store.check([_ASKED]):
                self._put_aside()
                return

    def _put_aside(self) -> None:
        done = "nothing"
        with self._lock:
            if self._state is not None and self._shards:
                try:
                    self._publish(self._state)
                    done = "all"
                except Exception as problem:
                    # Whatever it is, the ranks that wait must hear that there is nothing to wait for.
                    done = f"failed: {problem}"
        self.store.set(_done(self.rank), done)

    def _publish(self, state: TrainState) -> None:
        with tempfile.TemporaryDirectory(prefix="farspan-rescue-") as scratch:
            folder = Path(scratch) / "rank"
            folder.mkdir()
            save_file(self._on_host(), folder / _SHARD)
            (folder / _STATE).write_text(json.dumps({"num_ranks": self.num_ranks, **asdict(state)}), encoding="utf-8")
            publish_folder(folder, _place(self.output, self.rank))

    def _on_host(self) -> dict[str, Tensor]:
        device = _cuda_device(self._shards)
        if device is None or self._computed is None:
            return {name: tensor.detach().to("cpu").contiguous() for name, tensor in self._shards.items()}
        # A stream of its own: that of the run waits for the collective of the rank that failed.
        stream = torch.cuda.Stream(device)
        stream.wait_event(self._computed)
        with torch.cuda.stream(stream):
            return {name: tensor.detach().to("cpu").contiguous() for name, tensor in self._shards.items()}

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        keys = [_done(rank) for rank in range(self.num_ranks)]
        while not self.store.check(keys) and time.monotonic() < deadline:
            self._stop.wait(_LOOK_EVERY_S)


def first_line(problem: BaseException | None) -> str:
    """What went wrong, without the stack that torch appends."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _cuda_device(shards: Mapping[str, Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in shards.values() if tensor.is_cuda), None)


def load_rescue(output: str, rank: int, num_ranks: int, now: TrainState) -> tuple[TrainState, dict[str, Tensor]] | None:
    """What this rank put aside, if there is something whole of a run on as many ranks and on the same data."""
    with tempfile.TemporaryDirectory(prefix="farspan-rescue-") as scratch:
        try:
            folder = fetch_folder(_place(output, rank), Path(scratch))
            values = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if values.pop("num_ranks") != num_ranks:
                return None
            state = TrainState(**values)
            state.refuse_other_run(now)
            return state, load_file(folder / _SHARD)
        except (CorruptDataError, NotFoundError):
            return None


def clear_rescue(output: str) -> None:
    """Remove what was put aside: the run has gone past it."""
    store = open_store(join_uri(output, _FOLDER))
    for file in store.list():
        store.delete(file.path)


def _place(output: str, rank: int) -> str:
    return join_uri(output, f"{_FOLDER}/rank-{rank:05d}")


def _done(rank: int) -> str:
    return f"rescue-done-{rank}"
