"""How a run sends its sequences through the model chunk by chunk, and which chunks get a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.batch import PackedBatch, ShardedBatch
from farspan.chunked.seco import ChunkedStep
from farspan.chunked.spaco import Draw
from farspan.config.schema import MemoryConfig
from farspan.train.offload import ArenaMemory
from farspan.train.weights import WeightsEngine


@dataclass
class Chunks:
    """Chunk-wise optimization of a run."""

    step: ChunkedStep
    memory: MemoryConfig
    seed: int
    home: ArenaMemory | None = None
    """Where the arena lies; none: on the device."""

    def close(self) -> None:
        """Give the arena's memory back."""
        self.step.arena.release()
        if self.home is not None:
            self.home.close()

    def forward_backward(
        self,
        weights: WeightsEngine,
        batch: PackedBatch,
        shard: ShardedBatch,
        num_labels: Tensor,
        first_sequence: int,
        over_all_ranks: Callable[[Any, Any], Tensor],
        *,
        last: bool,
    ) -> Tensor:
        """Add the gradients of one sequence; its share of the loss.

        `first_sequence` is the number in the run of the sequence that the first data-parallel rank computes now: with
        the seed it decides the draw, so that every rank keeps the same chunks. `over_all_ranks` reduces a value by an
        operation of torch.distributed over every rank of the run, as gradients are.
        """

        def backward(loss: Tensor, last_chunk: bool) -> None:
            weights.backward(loss, last=last and last_chunk)

        draw = self._draw(batch, first_sequence, over_all_ranks)
        return self.step.forward_backward(weights.loss, shard, num_labels, draw, backward)

    def _draw(
        self, batch: PackedBatch, first_sequence: int, over_all_ranks: Callable[[Any, Any], Tensor]
    ) -> Draw | None:
        if self.memory.chunk == "seco":
            return None
        generator = torch.Generator().manual_seed((self.seed << 32 ^ first_sequence) % 2**63)
        return self.step.draw(
            batch,
            self.memory.chunk_keep,
            generator,
            sampling=self.memory.chunk_sampling,
            keep_labelled=self.memory.chunk_keep_labelled,
            # A chunk that matters on one rank is computed by all: they reduce its gradients together.
            over_ranks=lambda num_labels_C: over_all_ranks(num_labels_C, dist.ReduceOp.MAX),
        )
