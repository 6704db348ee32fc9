"""Decode in one launch: the forward of single tokens, captured for a few numbers of rows, over inputs that stay.

A decode step is a thousand small calls, and making them from Python takes longer than a GPU needs to read the weights,
and a third of what a CPU needs. Only the number of rows is part of a graph: lengths and tables are read where they are
(kernels/paged_decode/contract.py), and tables are as wide as they will ever be. Graphs of a GPU are captured when an
engine is built, so that no request waits for one. On a CPU, where a row more is a row more to compute, each number of
rows has its own, made when it has been asked for some times. Each is compared with the same step call by call, on
other inputs than it was captured with, before it answers anybody.

Shapes: B rows of a graph, R rows of the largest, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import getitem, is_

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.engine.attention import BoundTokens, Call, DecodeRows, PagedBatch, Segment
from farspan.engine.capture import Capture, Step
from farspan.engine.probe import forward
from farspan.engine.staged import Key, NextToken, Room, StagedRows
from farspan.errors import ModelError
from farspan.kv.pages import PagePool

logger = logging.getLogger(__name__)

# Rows of graphs: a step takes the next larger one, and computes at most half as many rows again from 16 rows on.
_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# How often a number of rows is asked for before it is captured, where that is done while requests run.
_OFTEN = 8
# Tokens of a sequence that a step is tried out on.
_TRIAL_TOKENS = 2
# Largest difference between a graph and its launches one by one, as a part of the logits' norm: the same kernels.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def ladder(most_rows: int) -> list[int]:
    """Numbers of rows to capture, the last of them enough for `most_rows` where any is."""
    return list(_LADDER[: bisect_left(_LADDER, most_rows) + 1])


@dataclass(frozen=True, slots=True)
class _Trial:
    """A token for trying a step out."""

    pages: Sequence[int]
    token: int
    past: int

    @property
    def tokens(self) -> Sequence[int]:
        return (self.token,)

    @property
    def position(self) -> int:
        return self.past


@dataclass(slots=True)
class _Later:
    """What is captured once it was asked for often."""

    capture: Capture
    most_rows: int
    asked: Counter[int] = field(default_factory=Counter)
    refused: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where the weights of a model are: a graph reads them there, whatever the model has by then."""

    owners: tuple[Mapping[str, Tensor | None], ...]
    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    places: list[int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Weights:
        found = [
            (module._parameters, name, weight)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        owners, names, weights = zip(*found, strict=True)
        return cls(owners, names, weights, [weight.data_ptr() for weight in weights])

    def hold(self) -> bool:
        # Looked at in every step: without Python from one to the next.
        there = map(getitem, self.owners, self.names)
        try:
            return all(map(is_, there, self.weights)) and [*map(Tensor.data_ptr, self.weights)] == self.places
        except KeyError:
            return False


class DecodeGraphs:
    """The graphs of one model over one pool."""

    def __init__(self, model: PreTrainedModel, pool: PagePool, calls: Sequence[Call], room: Room) -> None:
        self._model, self._pool, self._calls = model, pool, calls
        self._tokens = BoundTokens()
        self.staged = StagedRows(room, list(dict.fromkeys((call.rule, call.group) for call in calls)), pool.device)
        self.logits_RV = torch.empty(0)
        self._steps: dict[int, Step] = {}
        self._later: _Later | None = None
        self._weights = _Weights.of(model)

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows there is a graph for."""
        return sorted(self._steps)

    def prepare(self, sizes: Sequence[int], capture: Capture) -> None:
        """Capture steps of so many rows. Raises whatever a step that cannot be captured raises; then there are none."""
        try:
            self._capture(sizes, capture)
        except BaseException:
            self._steps.clear()
            raise

    def prepare_later(self, most_rows: int, capture: Capture) -> None:
        """Capture a number of rows, up to `most_rows`, when it has been asked for often enough."""
        self._later = _Later(capture, most_rows)

    def may_capture(self, num_rows: int) -> bool:
        """Whether so many rows have no graph yet, and `ask` may make one."""
        later = self._later
        return later is not None and num_rows <= later.most_rows and num_rows not in {*self._steps, *later.refused}

    def ask(self, num_rows: int) -> None:
        """Somebody had so many rows, for which there may be a graph: at times that takes three steps."""
        later = self._later
        if later is None:
            return
        later.asked[num_rows] += 1
        if later.asked[num_rows] < _OFTEN or self._pool.num_free < self._pool.layout.num_pages(_TRIAL_TOKENS):
            return
        try:
            self._capture([num_rows], later.capture)
        # Whatever a forward raises that cannot be captured: call by call, it was right in the trial at load.
        except Exception as problem:
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
            logger.info("decode of %d rows stays call by call: %s", num_rows, reason)
            later.refused.add(num_rows)
            if not self._steps:
                # It is the model, not the number of rows.
                self._later = None

    def _capture(self, sizes: Sequence[int], capture: Capture) -> None:
        began = time.perf_counter()
        held = self._pool.alloc(self._pool.layout.num_pages(_TRIAL_TOKENS))
        if held is None:
            raise ModelError(f"a pool of {self._pool.num_pages} pages has none to try a step with")
        try:
            # The largest first: the others fit into its memory.
            for size in sorted(sizes, reverse=True):
                self._prepare(size, capture, held)
        finally:
            self._pool.free(held)
        logger.info("decode of %s rows in one launch (%.1f s)", list(sizes), time.perf_counter() - began)

    def run(self, pieces: Sequence[NextToken]) -> Tensor | None:
        """Logits [B, V] after the next token of each sequence; none where no graph has so many rows."""
        size = self.size_of(len(pieces))
        if size is None:
            return None
        self.staged.stage(pieces, size)
        # The next step overwrites them.
        return self.logits_RV[: len(pieces)].clone() if self.launch(size) else None

    def size_of(self, num_rows: int) -> int | None:
        """Rows of the graph that computes so many; none where no graph has so many."""
        if self._later is not None:
            return num_rows if num_rows in self._steps else None
        return next((size for size in self.sizes if size >= num_rows), None)

    def launch(self, size: int) -> bool:
        """Compute `logits_RV` of the staged rows. False: they mean nothing, and there are no graphs any more."""
        self._steps[size]()
        # Looked at while the device computes.
        if not self._weights.hold():
            logger.warning("decode is launched kernel by kernel from now on: a weight of the model was exchanged")
            self._steps.clear()
            self._later = None
            return False
        return True

    def _prepare(self, size: int, capture: Capture, pages: Sequence[int]) -> None:
        tokens = self._model.get_input_embeddings().num_embeddings
        self.staged.stage([_Trial(pages, token=size % tokens, past=0)], size)
        again = capture(partial(self._step, size))
        # Another token at another place, unlike that of any other size: what the capture took for fixed shows. Its key
        # and value are written by nobody else before: if it did not write them, that would show, too.
        self.staged.stage([_Trial(pages, token=(size + 1) % tokens, past=1)], size)
        if not len(self.logits_RV):
            raise ModelError(f"captured logits of {size} rows were never computed")
        self.logits_RV[:size].fill_(torch.nan)
        again()
        got_BV, want_BV = self.logits_RV[:size].double(), self._forward(size).double()
        error = float((got_BV - want_BV).norm() / want_BV.norm())
        # Written so that NaN is refused too.
        if not error <= _TOLERANCE.get(self.logits_RV.dtype, 1e-2):
            raise ModelError(f"captured logits of {size} rows differ by {error:.2g} of their norm")
        self._steps[size] = again

    def _step(self, size: int) -> None:
        logits_BV = self._forward(size)
        if not len(self.logits_RV):
            self.logits_RV = logits_BV.new_empty(self.staged.num_rows, logits_BV.shape[1])
        self.logits_RV[:size].copy_(logits_BV)

    def _forward(self, size: int) -> Tensor:
        staged = self.staged
        parts: dict[Key, Sequence[DecodeRows | Segment]] = {**staged.parts(size)}
        batch = PagedBatch(self._pool, self._calls, staged.pages_BG(size), staged.slots_B(size), parts, self._tokens)
        return forward(self._model, staged.tokens_B(size), staged.positions_B(size), batch, None)
