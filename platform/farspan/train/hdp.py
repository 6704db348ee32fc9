"""The backward of one step in which every document has its own set of ranks (parallel.hdp).

Shapes: T tokens of a micro-batch, t tokens of it this rank holds.

The documents of a step are those of its sequences, which are what they are without hdp: loss and gradients are the
same sums in another order. Ranks run different numbers of micro-batches, so none of them may be a collective over all
ranks: weights are gathered once before the first and gradients summed once after the last.
See docs/decisions/0022-hybrid-data-parallelism.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.data.balance import Cost, MicroBatch, Spill, StepPlan, balance
from farspan.models.attention import PackedAttention
from farspan.parallel.documents import LocalAttention
from farspan.parallel.layout import ContiguousLayout, Layout, make_layout
from farspan.parallel.pairs import PairTable
from farspan.parallel.ranksets import RankSets
from farspan.parallel.shard import gathered, sum_gradients
from farspan.parallel.strategy import SequenceRanks, choose_layout, make_strategy
from farspan.parallel.whole import WholeSequence
from farspan.train.offload import RunOffload
from farspan.train.samples import Sample, WitnessedReader, samples_of
from farspan.train.weights import WeightsEngine


@dataclass(frozen=True)
class Work:
    """What one forward takes."""

    shard: ShardedBatch
    attention: PackedAttention
    whole: WholeSequence
    spilled: float
    """Share of what it keeps that must leave the device."""


@dataclass
class HybridStep:
    """Documents over any ranks. `capacity` are the tokens one rank holds of a micro-batch."""

    sets: RankSets
    strategy: str
    capacity: int
    cost: Cost
    device: torch.device
    spill: Spill | None = None
    """With it long documents get fewer ranks, and only what these have no room for leaves the device."""

    def plan(self, reader: WitnessedReader, sequences: range) -> tuple[tuple[Sample, ...], StepPlan]:
        """The documents of these sequences and which ranks compute them: the same on every rank."""
        samples = tuple(sample for index in sequences for sample in samples_of(reader.plan, index))
        lengths = [sample.num_tokens for sample in samples]
        return samples, balance(lengths, self.sets.num_ranks, self.capacity, self.cost, self.spill)

    def backward(
        self,
        weights: WeightsEngine,
        reader: WitnessedReader,
        sequences: range,
        over_all_ranks: Callable[[Any], Tensor],
        offload: RunOffload | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the documents of `sequences` into the engine; (mean loss, number of labels) over all ranks."""
        samples, plan = self.plan(reader, sequences)
        work = [self._work(micro, samples, reader) for micro in plan.work[self.sets.rank]]
        num_labels = over_all_ranks(sum(int((one.shard.labels_T != IGNORED_LABEL).sum()) for one in work))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        with gathered(weights.module):
            for one in work:
                loss += self.compute(weights, one, num_labels, offload)
            self.sum_over_ranks(weights, num_labels)
        return over_all_ranks(loss), num_labels

    def work_on(self, batch: PackedBatch, ranks: tuple[int, ...], spilled: float = 0.0) -> Work:
        """This rank's part of a micro-batch of these ranks."""
        if len(ranks) == 1:
            return self._alone(batch, spilled)
        batch = _padded(batch, len(ranks))
        layout = self._lay_out(batch, len(ranks))
        exchange = self.sets.of(ranks)
        return Work(
            shard=layout.shard(batch, exchange.rank),
            attention=make_strategy(self.strategy, SequenceRanks(exchange, exchange, exchange), layout, batch.bounds),
            whole=WholeSequence(batch.bounds, exchange, layout),
            spilled=spilled,
        )

    def compute(self, weights: WeightsEngine, one: Work, num_labels: Tensor, offload: RunOffload | None) -> Tensor:
        """Add the gradients of a micro-batch to this rank's, where weights are gathered; its share of the loss."""
        with self._offloaded(one, offload):
            found = weights.loss(one.shard.to(self.device), one.attention, num_labels, one.whole)
            weights.backward(found, last=False)
        return found.detach()

    def _work(self, micro: MicroBatch, samples: Sequence[Sample], reader: WitnessedReader) -> Work:
        batch = reader.share([samples[document] for document in micro.documents], len(micro.ranks))
        return self.work_on(batch, micro.ranks, micro.spilled)

    def _alone(self, batch: PackedBatch, spilled: float = 0.0) -> Work:
        layout = ContiguousLayout(batch.num_tokens, 1)
        attention = LocalAttention(PairTable.of(layout, batch.bounds))
        return Work(layout.shard(batch, 0), attention, WholeSequence(batch.bounds), spilled)

    def _lay_out(self, batch: PackedBatch, num_ranks: int) -> Layout:
        # Stripes of each document, because a document's length divides by nothing.
        name = "contiguous" if self.strategy == "ulysses" else "document_zigzag"
        layout = choose_layout(self.strategy, name, num_ranks)
        return make_layout(layout, batch.num_tokens, num_ranks, batch.bounds)

    def _offloaded(self, one: Work, offload: RunOffload | None) -> AbstractContextManager[None]:
        if offload is None:
            return nullcontext()
        if self.spill is None:
            return offload.step()
        return offload.step(one.spilled) if one.spilled else nullcontext()

    def sum_over_ranks(self, weights: WeightsEngine, num_labels: Tensor) -> None:
        """Sum gradients, last of all where weights are gathered; collective. torch does so in a backward only: each
        rank runs one of a token without a label, in which no rank waits for a part of the others. Its own gradients
        are zero.
        """
        none_T = torch.zeros(1, dtype=torch.int64)
        one = self._alone(PackedBatch(none_T, torch.full_like(none_T, IGNORED_LABEL), none_T, (0, 1), ()))
        sum_gradients(weights.module)
        loss = weights.loss(one.shard.to(self.device), one.attention, num_labels, one.whole)
        weights.backward(loss, last=True)


def _padded(batch: PackedBatch, num_ranks: int) -> PackedBatch:
    """`batch` with up to R - 1 tokens more, so that R ranks hold equally many: a document of its own, no labels."""
    missing = -batch.num_tokens % num_ranks
    if missing == 0:
        return batch
    zeros_T = batch.tokens_T.new_zeros(missing)
    return PackedBatch(
        tokens_T=torch.cat([batch.tokens_T, zeros_T]),
        labels_T=torch.cat([batch.labels_T, torch.full_like(zeros_T, IGNORED_LABEL)]),
        positions_T=torch.cat([batch.positions_T, torch.arange(missing)]),
        bounds=(*batch.bounds, batch.num_tokens + missing),
        sample_ids=batch.sample_ids,
    )
