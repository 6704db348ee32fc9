"""How a run sends its sequences through the model chunk by chunk, and which chunks get a backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.batch import IGNORED_LABEL, ShardedBatch
from farspan.chunked.seco import ChunkedStep
from farspan.chunked.spaco import Draw, bernoulli, even_probabilities, every_chunk
from farspan.config.schema import MemoryConfig
from farspan.train.weights import WeightsEngine


@dataclass
class Chunks:
    """Chunk-wise optimization of a run. `group` is every rank of it: gradients are reduced over all of them."""

    step: ChunkedStep
    memory: MemoryConfig
    seed: int
    group: dist.ProcessGroup

    def forward_backward(
        self, weights: WeightsEngine, shard: ShardedBatch, num_labels: Tensor, first_sequence: int, *, last: bool
    ) -> Tensor:
        """Add the gradients of one sequence; its share of the loss.

        `first_sequence` is the number in the run of the sequence that the first data-parallel rank computes now: with
        the seed it decides the draw, so that every rank keeps the same chunks.
        """

        def backward(loss: Tensor, last_chunk: bool) -> None:
            weights.backward(loss, last=last and last_chunk)

        draw = self._draw(shard, first_sequence)
        return self.step.forward_backward(weights.loss, shard, num_labels, draw, backward)

    def _draw(self, shard: ShardedBatch, first_sequence: int) -> Draw:
        layout = self.step.lay_out(shard.bounds[-1])
        if self.memory.chunk == "seco":
            return every_chunk(len(layout.chunks))
        labelled_C = torch.stack(
            [(shard.labels_T[layout.held_rows(chunk)] != IGNORED_LABEL).any().int() for chunk in layout.chunks]
        )
        # A chunk that one rank must compute is computed by all: they reduce its gradients together.
        dist.all_reduce(labelled_C, op=dist.ReduceOp.MAX, group=self.group)
        keep, always = self.memory.chunk_keep, self.memory.chunk_keep_labelled
        probabilities = even_probabilities(keep, labelled_C.bool().tolist(), keep_labelled=always)
        generator = torch.Generator().manual_seed((self.seed << 32 ^ first_sequence) % 2**63)
        return bernoulli(probabilities, generator)
