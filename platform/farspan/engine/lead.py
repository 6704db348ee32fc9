"""An engine of several ranks: the leader decides and tells, the others compute the same batch on their own heads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.engine.cut import Share
from farspan.engine.faster import speed_up
from farspan.engine.gang import Gang, Word
from farspan.engine.orders import Order, read_order, write_order
from farspan.engine.path import Runs, open_path
from farspan.engine.runner import Piece
from farspan.errors import EngineError
from farspan.kv.pages import PagePool

# How often a leader with nothing to compute asks whether all are there: several times within any deadline.
_MOST_BEAT_S = 2.0
_BEATS_PER_DEADLINE = 4


class Leader:
    """Runs batches on all ranks. Its pool decides for theirs: a page means the same tokens everywhere."""

    def __init__(self, runner: Runs, pool: PagePool, gang: Gang) -> None:
        assert gang.leads
        self._runner, self._pool, self._gang = runner, pool, gang
        self._lost = ""
        # From now on: what the trial at load did, every rank did itself.
        pool.take_changes()
        # A batch or a beat at a time: ranks must meet in the same order.
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="gang-beat", daemon=True)
        self._beats.start()

    @property
    def lost(self) -> str:
        """Why nothing is computed any more; empty: it is."""
        return self._lost

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order.

        Raises EngineError when a rank is lost, and from then on.
        """
        with self._turn:
            if self._lost:
                raise EngineError(self._lost)
            try:
                self._gang.tell(Word.RUN, write_order(Order(self._pool.take_changes(), pieces)))
                return self._runner.run(pieces)
            except BaseException as problem:
                # The others may wait in the middle of this batch: they and this rank do not meet again.
                self._lost = str(problem) or type(problem).__name__
                raise

    def close(self) -> None:
        """Let the others end. Those that do not hear it notice that this process ends."""
        self._over.set()
        # Whoever has the turn gives it back within the deadline.
        self._beats.join()
        with self._turn, suppress(EngineError):
            if not self._lost:
                self._lost = "the engine was closed"
                self._gang.tell(Word.END)

    def _beat(self) -> None:
        while not self._over.wait(min(_MOST_BEAT_S, self._gang.deadline_s / _BEATS_PER_DEADLINE)):
            with self._turn:
                if self._lost:
                    return
                try:
                    self._gang.tell(Word.BEAT)
                    self._gang.answer()
                except EngineError as problem:
                    self._lost = str(problem)


def follow(model: PreTrainedModel, config: EngineConfig, share: Share) -> None:
    """Compute what the leader tells, until it ends the engine. Takes the model over.

    Raises what `open_path` raises, and EngineError when the leader or another rank is lost.
    """
    path = open_path(model, config, share)
    speed_up(model)
    while True:
        word, numbers = share.gang.hear()
        if word is Word.END:
            return
        if word is Word.BEAT:
            share.gang.answer()
            continue
        order = read_order(numbers)
        path.pool.mirror(order.changes)
        path.runner.run(order.pieces)
