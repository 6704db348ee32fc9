"""The leader of an engine of several ranks: it decides alone, tells the others, and computes its own part."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from torch import Tensor

from farspan.engine.gang import Gang, Word
from farspan.engine.orders import write_changes, write_pieces
from farspan.engine.path import Runs
from farspan.engine.runner import Piece
from farspan.errors import EngineError
from farspan.kv.pages import PagePool

# How often a leader with nothing to compute asks whether all are there: several times within any deadline.
_MOST_BEAT_S = 2.0
_BEATS_PER_DEADLINE = 4
_NOTHING = np.zeros(0, np.int64)


class Leader:
    """Runs batches on all ranks. Its pool decides for theirs: a page means the same tokens everywhere."""

    def __init__(self, runner: Runs, pool: PagePool, gang: Gang) -> None:
        assert gang.leads
        self._runner, self._pool, self._gang = runner, pool, gang
        self._lost = ""
        # From now on: what the trial at load did, every rank did itself.
        pool.take_changes()
        # A message at a time: ranks must meet in the same order.
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="gang-beat", daemon=True)
        self._beats.start()

    @property
    def lost(self) -> str:
        """Why nothing is computed any more; empty: it is."""
        return self._lost

    @property
    def num_others(self) -> int:
        """Ranks beside this one."""
        return self._gang.size - 1

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order.

        Raises EngineError when a rank is lost, and from then on.
        """
        with self._meeting():
            self._tell(Word.RUN, write_pieces(pieces))
            return self._runner.run(pieces)

    def ask(self, word: Word, body: np.ndarray, num_answers: int) -> list[np.ndarray]:
        """So many numbers of each other rank. Raises EngineError when a rank is lost, and from then on."""
        with self._meeting():
            self._tell(word, body)
            return self._gang.collect(np.zeros(num_answers, np.int64))[1:]

    def close(self) -> None:
        """Let the others end. Those that do not hear it notice that this process ends."""
        self._over.set()
        # Whoever has the turn gives it back within the deadline.
        self._beats.join()
        with self._turn, suppress(EngineError):
            if not self._lost:
                self._lost = "the engine was closed"
                self._gang.tell(Word.END)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        with self._turn:
            if self._lost:
                raise EngineError(self._lost)
            try:
                yield
            except BaseException as problem:
                # The others may wait in the middle of it: they and this rank do not meet again.
                self._lost = str(problem) or type(problem).__name__
                raise

    def _tell(self, word: Word, body: np.ndarray) -> None:
        """First of all pages get the content they have here: what follows may write into them."""
        self._gang.tell(word, write_changes(self._pool.take_changes(), body))

    def _beat(self) -> None:
        while not self._over.wait(min(_MOST_BEAT_S, self._gang.deadline_s / _BEATS_PER_DEADLINE)):
            with suppress(EngineError):
                self.ask(Word.BEAT, _NOTHING, 1)
