"""Steps of the same sequences by one graph, each launched from tokens that the host need not have seen.

The token that a step chose stays on the device and is put among the inputs of the next one there; the host gets a copy
to look at. So a step can be launched before anybody looked at the one before it. N rows of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.engine.graphs import DecodeGraphs
from farspan.engine.request import SamplingParams
from farspan.engine.sampler import SteadyChoice
from farspan.engine.staged import NextToken


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device may still be computing."""

    told_2N: Tensor
    """On the host, once it is done: the token of each row, and its highest logit."""
    done: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[bool]]:
        """The token of each row, and whether its logits are numbers."""
        if self.done is not None:
            self.done.synchronize()
        tokens, highest = self.told_2N.tolist()
        return [int(token) for token in tokens], [math.isfinite(high) for high in highest]


class Course:
    """Rows that stay the same, step after step. At most two of its steps are on their way at a time."""

    def __init__(self, graphs: DecodeGraphs, pieces: Sequence[NextToken], params: Sequence[SamplingParams]) -> None:
        """`pieces` are the first step, which a graph has rows for."""
        size = graphs.size_of(len(pieces))
        assert size is not None, "a course is of rows that there is a graph for"
        self._graphs, self._size = graphs, size
        graphs.staged.stage(pieces, size)
        self._number = graphs.staged.num_staged
        self._logits_NV = graphs.logits_RV[: len(pieces)]
        self._choice = SteadyChoice(params, [piece.position + 1 for piece in pieces], self._logits_NV)
        self._on_cuda = self._logits_NV.device.type == "cuda"
        # One is read while the other is written.
        self._told = torch.empty(2, 2, len(pieces), dtype=torch.float64, pin_memory=self._on_cuda).unbind()
        self._tokens_N: Tensor | None = None
        self.num_launched = 0

    @property
    def holds(self) -> bool:
        """Whether its rows are still the staged ones, and its graph is there."""
        return self._graphs.staged.num_staged == self._number and self._size in self._graphs.sizes

    def launch(self, grown: Sequence[tuple[int, Sequence[int]]]) -> Launched | None:
        """The next step; none where a weight was exchanged, and whatever is computed means nothing.

        `grown`: (row, its page of each group) of every row whose token is the first of a place; not in the first step.
        """
        if self._tokens_N is not None:
            self._graphs.staged.stage_next(grown, self._tokens_N, self._size)
        if not self._graphs.launch(self._size):
            # It writes to pages that may be given back now.
            if self._on_cuda:
                torch.cuda.current_stream(self._logits_NV.device).synchronize()
            return None
        self._tokens_N, highest_N = self._choice.choose(self._logits_NV)
        told_2N = self._told[self.num_launched % 2]
        told_2N[0].copy_(self._tokens_N, non_blocking=True)
        told_2N[1].copy_(highest_N, non_blocking=True)
        self.num_launched += 1
        if not self._on_cuda:
            return Launched(told_2N, None)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._logits_NV.device))
        return Launched(told_2N, done)
