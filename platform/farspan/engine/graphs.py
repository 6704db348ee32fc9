"""Decode in one launch: the forward of single tokens, captured for a few numbers of rows, over inputs that stay.

A decode step of a GPU is a thousand small kernels, and launching them takes longer than reading the weights. Only the
number of rows is part of a graph: lengths and tables are read on the device (kernels/paged_decode/contract.py), and
tables are as wide as they will ever be. Graphs are captured when an engine is built, so that no request waits for one,
and each is compared with the same step launch by launch before it answers anybody.

Shapes: B rows of a graph, R rows of the largest, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
# Largest difference between a graph and its launches one by one, as a part of the logits' norm: the same kernels.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def ladder(most_rows: int) -> list[int]:
    """Numbers of rows to capture, the last of them enough for `most_rows` where any is."""
    return list(_LADDER[: bisect_left(_LADDER, most_rows) + 1])


@dataclass(frozen=True, slots=True)
class _First:
    """A token without a past, for trying a step out."""

    pages: Sequence[int]
    tokens: Sequence[int] = (1,)
    past: int = 0


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where the weights of a model are: a graph reads them there, whatever the model has by then."""

    places: tuple[tuple[Mapping[str, Tensor | None], str, Tensor, int], ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Weights:
        return cls(
            tuple(
                (module._parameters, name, weight, weight.data_ptr())
                for module in model.modules()
                for name, weight in module._parameters.items()
                if weight is not None
            )
        )

    def hold(self) -> bool:
        return all(there.get(name) is weight and weight.data_ptr() == at for there, name, weight, at in self.places)


class DecodeGraphs:
    """The graphs of one model over one pool."""

    def __init__(self, model: PreTrainedModel, pool: PagePool, calls: Sequence[Call], room: Room) -> None:
        self._model, self._pool, self._calls = model, pool, calls
        self._tokens = BoundTokens()
        self.staged = StagedRows(room, list(dict.fromkeys((call.rule, call.group) for call in calls)), pool.device)
        self.logits_RV = torch.empty(0)
        self._steps: dict[int, Step] = {}
        self._weights = _Weights.of(model)

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows there is a graph for."""
        return sorted(self._steps)

    def prepare(self, sizes: Sequence[int], capture: Capture) -> None:
        """Capture steps of so many rows. Raises whatever a step that cannot be captured raises; then there are none."""
        began = time.perf_counter()
        held = self._pool.alloc(self._pool.layout.num_pages(1))
        if held is None:
            raise ModelError(f"a pool of {self._pool.num_pages} pages has none to try a step with")
        try:
            # The largest first: the others fit into its memory.
            for size in sorted(sizes, reverse=True):
                self._prepare(size, capture, held)
        except BaseException:
            self._steps.clear()
            raise
        finally:
            self._pool.free(held)
        logger.info("decode of up to %d rows in one launch (%.1f s)", max(sizes), time.perf_counter() - began)

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
        return next((size for size in self.sizes if size >= num_rows), None)

    def launch(self, size: int) -> bool:
        """Compute `logits_RV` of the staged rows. False: they mean nothing, and there are no graphs any more."""
        self._steps[size]()
        # Looked at while the device computes.
        if not self._weights.hold():
            logger.warning("decode is launched kernel by kernel from now on: a weight of the model was exchanged")
            self._steps.clear()
            return False
        return True

    def _prepare(self, size: int, capture: Capture, pages: Sequence[int]) -> None:
        self.staged.stage([_First(pages)], size)
        want_BV = self._forward(size)
        if len(self.logits_RV) < size:
            self.logits_RV = torch.empty_like(want_BV)
        again = capture(partial(self._step, size))
        self.logits_RV.fill_(torch.nan)
        again()
        error = float((self.logits_RV[:size].double() - want_BV.double()).norm() / want_BV.double().norm())
        # Written so that NaN is refused too.
        if not error <= _TOLERANCE.get(want_BV.dtype, 1e-2):
            raise ModelError(f"captured logits of {size} rows differ by {error:.2g} of their norm")
        self._steps[size] = again

    def _step(self, size: int) -> None:
        self.logits_RV[:size].copy_(self._forward(size))

    def _forward(self, size: int) -> Tensor:
        staged = self.staged
        parts: dict[Key, Sequence[DecodeRows | Segment]] = {**staged.parts(size)}
        batch = PagedBatch(self._pool, self._calls, staged.pages_BG(size), staged.slots_B(size), parts, self._tokens)
        return forward(self._model, staged.tokens_B(size), staged.positions_B(size), batch, None)
