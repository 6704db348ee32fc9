"""How a run sends its sequences through the model chunk by chunk, and which chunks get a backward pass."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Chunk-wise optimization of a run. `group` is every rank of it: gradients are reduced over all of them."""

    step: ChunkedStep
    memory: MemoryConfig
    seed: int
    group: dist.ProcessGroup
    device: torch.device
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
        *,
        last: bool,
    ) -> Tensor:
        """Add the gradients of one sequence; its share of the loss.

        `first_sequence` is the number in the run of the sequence that the first data-parallel rank computes now: with
        the seed it decides the draw, so that every rank keeps the same chunks.
        """

        def backward(loss: Tensor, last_chunk: bool) -> None:
            weights.backward(loss, last=last and last_chunk)

        draw = self._draw(batch, first_sequence)
        return self.step.forward_backward(weights.loss, shard, num_labels, draw, backward)

    def _draw(self, batch: PackedBatch, first_sequence: int) -> Draw | None:
        if self.memory.chunk == "seco":
            return None
        generator = torch.Generator().manual_seed((self.seed << 32 ^ first_sequence) % 2**63)
        return self.step.draw(
            batch,
            self.memory.chunk_keep,
            generator,
            sampling=self.memory.chunk_sampling,
            keep_labelled=self.memory.chunk_keep_labelled,
            over_ranks=self._most,
        )

    def _most(self, num_labels_C: Tensor) -> Tensor:
        """A chunk that matters on one rank is computed by all: they reduce its gradients together."""
        most_C = num_labels_C.to(self.device)
        dist.all_reduce(most_C, op=dist.ReduceOp.MAX, group=self.group)
        return most_C.cpu()
