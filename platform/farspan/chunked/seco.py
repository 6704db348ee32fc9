"""Chunk-wise optimization: the gradients of a whole sequence with one chunk's activations in memory.

Forward, chunk after chunk without autograd, leaves keys and values in the arena. Backward then takes the chunks last
to first: each is computed again, with autograd, and by the time its turn comes every later chunk has left the
gradients of its keys. Price: one more forward of all chunks but the last. Exact, unless chunks are left out (spaco.py).
Source: SeCO (Li et al. 2025, sequential chunk-wise optimization), with an arena in place of per-chunk caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.activations.tiled import refuse_dropout
from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.chunked.arena import KvArena
from farspan.chunked.attention import ChunkAttention, ChunkedAttention
from farspan.chunked.layout import ChunkedLayout
from farspan.chunked.spaco import Draw, count_labels, draw_chunks, every_chunk
from farspan.errors import ConfigError, ModelError
from farspan.models.mixers import recurrent_mixers
from farspan.parallel.exchange import Exchange
from farspan.parallel.strategy import SequenceParallel

STRATEGIES = ("ulysses", "allgather", "hybrid")

ChunkLoss = Callable[[ShardedBatch, ChunkAttention, Tensor], Tensor]
"""(chunk, its attention, number of labels) -> loss: a `PackedLoss`, sharded or not."""
ChunkBackward = Callable[[Tensor, bool], None]
"""(weighted loss of a chunk, whether it is the last backward of this sequence)."""


def backward_of(loss: Tensor, last: bool) -> None:
    """Torch's own."""
    loss.backward()


@dataclass
class ChunkedStep:
    """Forward and backward by chunks of `chunk_tokens` tokens of the sequence (over all ranks of `sequence`)."""

    model: PreTrainedModel
    chunk_tokens: int
    sequence: SequenceParallel | None = None
    arena: KvArena = field(default_factory=KvArena)

    def __post_init__(self) -> None:
        refuse_unchunkable(self.model)
        if self.num_ranks > 1 and self.sequence is not None and self.sequence.strategy not in STRATEGIES:
            raise ConfigError(
                "parallel.strategy",
                f"with memory.chunk must be one of {', '.join(STRATEGIES)}: keys of chunks are not sent around a ring",
                self.sequence.strategy,
                "use parallel.strategy=ulysses, or allgather, which holds the keys of one chunk at a time",
            )

    @property
    def num_ranks(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.sequence is None else self.sequence.ranks.all.num_ranks

    @property
    def exchanges(self) -> tuple[Exchange | None, Exchange | None]:
        """(ranks keys are gathered from, ranks heads are exchanged with)."""
        if self.sequence is None or self.num_ranks == 1:
            return None, None
        ranks = self.sequence.ranks
        return {"ulysses": (None, ranks.all), "allgather": (ranks.all, None), "hybrid": (ranks.ring, ranks.ulysses)}[
            self.sequence.strategy
        ]

    def lay_out(self, num_tokens: int) -> ChunkedLayout:
        """Which tokens of a sequence each rank holds.

        Raises:
            ConfigError: lengths that ranks cannot share equally.
        """
        return ChunkedLayout(num_tokens, self.num_ranks, self.chunk_tokens)

    def forward_backward(
        self,
        loss: ChunkLoss,
        shard: ShardedBatch,
        num_labels: Tensor,
        draw: Draw | None = None,
        backward: ChunkBackward = backward_of,
    ) -> Tensor:
        """Add the gradients of this rank's `shard` (cut by `lay_out`) to the weights; the loss.

        With a `draw` that leaves chunks out, loss and gradients are estimates. It must keep the same chunks on every
        rank that reduces gradients together.
        """
        sequence = _Sequence(self, shard)
        draw = draw or every_chunk(sequence.num_chunks)
        assert len(draw.weights) == sequence.num_chunks, "one weight per chunk"
        kept = [number for number, weight in enumerate(draw.weights) if weight > 0]
        self.arena.begin(sequence.attention.rows[-1].stop, gradients=True)
        total = torch.zeros((), dtype=torch.float64, device=num_labels.device)
        with torch.no_grad():
            # What comes after the last chunk that is kept, nobody looks at.
            for number in range(kept[-1] if kept else 0):
                loss(_unlabelled(sequence.chunk(number)), sequence.attention.chunk(number, store=True), num_labels)
        for number in reversed(kept):
            weight = draw.weights[number]
            attention = sequence.attention.chunk(number, weight=weight)
            part = weight * loss(sequence.chunk(number), attention, num_labels)
            backward(part, number == kept[0])
            total += part.detach()
        return total

    def draw(
        self,
        batch: PackedBatch,
        keep: float,
        generator: torch.Generator,
        *,
        sampling: str = "independent",
        keep_labelled: bool = False,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Draw:
        """A draw for the whole sequence `batch`, of about the share `keep` of its chunks; see `draw_chunks`.

        All ranks that reduce gradients together need equal draws: equal generators, and where labels decide (chunks
        that hold some are always kept, or drawn by importance) also `over_ranks`, the maximum over those ranks.
        """
        num_labels = count_labels(batch.labels_T, self.lay_out(batch.num_tokens).chunks, IGNORED_LABEL)
        if over_ranks is not None and (keep_labelled or sampling == "importance"):
            num_labels = tuple(over_ranks(torch.tensor(num_labels, dtype=torch.float64)).tolist())
        return draw_chunks(sampling, num_labels, keep, generator, keep_labelled=keep_labelled)

    def forward_only(self, evaluate: Callable[[ShardedBatch, ChunkAttention], Tensor], shard: ShardedBatch) -> Tensor:
        """What `evaluate` gives for each token of this rank's `shard`, chunk after chunk, without autograd."""
        sequence = _Sequence(self, shard)
        last = sequence.num_chunks - 1
        self.arena.begin(sequence.attention.rows[-1].stop, gradients=False)
        with torch.no_grad():
            return torch.cat(
                [
                    evaluate(sequence.chunk(number), sequence.attention.chunk(number, store=number < last))
                    for number in range(last + 1)
                ]
            )


def refuse_unchunkable(model: PreTrainedModel) -> None:
    """Refuse a model whose chunks leave each other more than keys and values, or that is not the same twice.

    Raises:
        ModelError: why.
    """
    name = type(model).__name__
    if recurrent_mixers(model):
        raise ModelError(
            f"{name} has recurrent layers, whose state would have to be carried from chunk to chunk with its gradient; "
            "use memory.chunk=none"
        )
    refuse_dropout(model, f"a chunk of {name}", "memory.chunk")
    if getattr(model.config.get_text_config(decoder=True), "router_jitter_noise", 0.0):
        raise ModelError(f"{name}: router_jitter_noise makes a chunk computed twice differ; set it to 0")


@dataclass
class _Sequence:
    """One shard, cut into chunks."""

    step: ChunkedStep
    shard: ShardedBatch

    @cached_property
    def layout(self) -> ChunkedLayout:
        layout = self.step.lay_out(self.shard.bounds[-1])
        assert layout.shard_tokens == self.shard.tokens_T.numel(), "the shard was cut by lay_out"
        return layout

    @cached_property
    def attention(self) -> ChunkedAttention:
        return ChunkedAttention.of(self.step.arena, self.layout, self.shard.bounds, *self.step.exchanges)

    @property
    def num_chunks(self) -> int:
        return len(self.layout.chunks)

    def chunk(self, number: int) -> ShardedBatch:
        rows = self.layout.held_rows(self.layout.chunks[number])
        shard = self.shard
        return ShardedBatch(shard.tokens_T[rows], shard.labels_T[rows], shard.positions_T[rows], shard.bounds)


def _unlabelled(chunk: ShardedBatch) -> ShardedBatch:
    """Without labels the head is not computed."""
    return replace(chunk, labels_T=torch.full_like(chunk.labels_T, IGNORED_LABEL))
