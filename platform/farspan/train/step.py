"""One optimizer step: batches in, one StepReport out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.config.schema import OptimConfig
from farspan.errors import TrainingError
from farspan.parallel.exchange import Exchange
from farspan.parallel.layout import Layout
from farspan.parallel.mesh import Mesh
from farspan.parallel.strategy import SequenceParallel
from farspan.parallel.waits import Waits
from farspan.parallel.whole import WholeSequence
from farspan.telemetry.events import StepReport
from farspan.train.chunks import Chunks
from farspan.train.hdp import HybridStep
from farspan.train.held import DeviceMemory, Held, held_by
from farspan.train.loss import PackedLoss
from farspan.train.offload import RunOffload, RunTiers
from farspan.train.samples import WitnessedReader
from farspan.train.weights import WeightsEngine


@dataclass
class TrainStep:
    """Everything one step touches. `cursor` counts the sequences the whole run has consumed."""

    weights: WeightsEngine
    optim: OptimConfig
    num_steps: int
    accumulation: int
    mesh: Mesh
    sequence: SequenceParallel
    reader: WitnessedReader
    device: torch.device
    chunks: Chunks | None = None
    """How sequences are cut in time; none: they are not."""
    offload: RunOffload | None = None
    """Where activations wait; none: on the device."""
    hybrid: HybridStep | None = None
    """How documents find their ranks; none: whole sequences go to the ranks of the mesh."""
    tiers: RunTiers | None = None
    """What all of these keep beside the device lies in; none: nothing does."""
    cursor: int = 0
    device_memory: DeviceMemory = field(init=False)

    def __post_init__(self) -> None:
        self.device_memory = DeviceMemory(self.device)

    @property
    def loss(self) -> PackedLoss:
        """The model and its loss; its weights are cut by the engine."""
        return self.weights.module

    @property
    def exchange(self) -> Exchange:
        """What the ranks of this sequence send each other, counted."""
        return self.sequence.ranks.all

    @property
    def waits(self) -> Waits:
        """How long this rank waits for others: in attention and recurrent layers, and for labels, draws and the loss.

        Not what the engine of weights waits for: gathering weights, summing gradients and taking their norm.
        """
        return self.exchange.counter.waits

    @property
    def held(self) -> Held:
        """What this rank holds now; on CUDA, of the device, the most since the step began."""
        tiers = () if self.tiers is None else self.tiers.all
        return held_by(self.device_memory.of_step, tiers, self.weights.host_bytes())

    def close(self) -> None:
        """Give back what waits beside the device."""
        if self.chunks is not None:
            self.chunks.close()
        if self.offload is not None:
            self.offload.close()
        if self.tiers is not None:
            self.weights.close()
            self.tiers.close()

    def run(self, step: int, before_update: Callable[[], None] | None = None) -> StepReport:
        """Consume dp * accumulation sequences and change the weights once; `step` counts from 0.

        `before_update` is called when nothing but the change of the weights is left to do.

        Raises:
            TrainingError: the loss or the gradient is not finite; weights are left as they were.
        """
        started, sent_before = time.perf_counter(), self.exchange.bytes_sent
        self.waits.begin()
        self.device_memory.begin()
        loss, num_labels = self.backward()
        lr = learning_rate(self.optim, step, self.num_steps)
        if before_update is not None:
            before_update()
        grad_norm = self.weights.step(lr) if torch.isfinite(loss) else torch.tensor(math.nan)
        if not torch.isfinite(grad_norm):
            raise TrainingError(
                f"step {step + 1}: loss {loss.item():g}, gradient norm {grad_norm.item():g}; weights were not changed; "
                f"lower optim.lr ({self.optim.lr:g}) or optim.max_grad_norm and resume from the last checkpoint"
            )
        num_sequences = self.mesh.dp * self.accumulation
        self.cursor += num_sequences
        tokens = num_sequences * self.reader.plan.sequence_tokens
        seconds = time.perf_counter() - started
        waited, sizes = self.waits.seconds(), (*self.held, self.device_memory.most_ever)
        sent, all_waited = self._over_all_ranks((self.exchange.bytes_sent - sent_before, waited)).tolist()
        most_waited, *most = self._over_all_ranks((waited, *sizes), dist.ReduceOp.MAX).tolist()
        *tiers, peak = (int(size) for size in most)
        held = Held(*tiers)
        return StepReport(
            step=step + 1,
            loss=loss.item(),
            learning_rate=lr,
            grad_norm=grad_norm.item(),
            tokens=tokens,
            num_labels=int(num_labels.item()),
            step_s=seconds,
            tokens_per_s=tokens / seconds,
            peak_memory_bytes=peak,
            bytes_sent=int(sent),
            device_bytes=held.device,
            dram_bytes=held.dram,
            cxl_bytes=held.cxl,
            emulated_cxl_bytes=held.emulated_cxl,
            nvme_bytes=held.nvme,
            exposed_s=all_waited / self.mesh.all.size(),
            exposed_max_s=most_waited,
        )

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of one step into the engine; (mean loss, number of labels) over all ranks.

        The cursor does not move: called twice, it computes the same sequences twice.
        """
        if self.hybrid is not None:
            sequences = range(self.cursor, self.cursor + self.mesh.dp * self.accumulation)
            return self.hybrid.backward(self.weights, self.reader, sequences, self._over_all_ranks, self.offload)
        shards = list(self._shards())
        num_labels = self._over_all_ranks(sum((s.labels_T != IGNORED_LABEL).sum() for _, s, _ in shards))
        losses = [
            self._forward_backward(*shard, num_labels, micro, last=micro + 1 == self.accumulation)
            for micro, shard in enumerate(shards)
        ]
        loss = self._over_all_ranks(sum(losses))
        return loss, num_labels

    def _shards(self) -> Iterator[tuple[PackedBatch, ShardedBatch, Layout]]:
        for micro in range(self.accumulation):
            batch = self.reader.batch(self.cursor + micro * self.mesh.dp + self.mesh.dp_rank)
            layout = self._lay_out(batch)
            shard = layout.shard(batch, self.exchange.rank)
            yield batch, shard.to(self.device), layout

    def _lay_out(self, batch: PackedBatch) -> Layout:
        if self.chunks is not None:
            return self.chunks.step.lay_out(batch.num_tokens)
        return self.sequence.lay_out(batch.num_tokens, batch.bounds)

    def _forward_backward(
        self, batch: PackedBatch, shard: ShardedBatch, layout: Layout, num_labels: Tensor, micro: int, *, last: bool
    ) -> Tensor:
        """Add the gradients of one sequence; its share of the loss."""
        if self.chunks is not None:
            first_sequence = self.cursor + micro * self.mesh.dp
            return self.chunks.forward_backward(
                self.weights, batch, shard, num_labels, first_sequence, self._over_all_ranks, last=last
            )
        attention = self.sequence.attention(layout, shard.bounds)
        whole = WholeSequence(shard.bounds, self.exchange, layout)
        with nullcontext() if self.offload is None else self.offload.step():
            loss = self.weights.loss(shard, attention, num_labels, whole)
            self.weights.backward(loss, last=last)
        return loss.detach()

    def _over_all_ranks(self, value: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
        # A rank that is alone waits for nobody.
        with self.waits.on(self.device) if self.mesh.all.size() > 1 else nullcontext():
            dist.all_reduce(total, op=op, group=self.mesh.all.get_group())
        return total


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to `final_lr_fraction` at the last step."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    low = optim.lr * optim.final_lr_fraction
    return low + (optim.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
