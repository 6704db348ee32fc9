"""What one rank of an examined layout computes. The judging is done elsewhere (judge.py), from plain numbers.

Shapes: T tokens of a sequence, t tokens this rank holds, V vocabulary, H query heads, G key/value heads, D, C head
dims of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from farspan.batch import IGNORED_LABEL, PackedBatch, ShardedBatch
from farspan.config.schema import ParallelConfig
from farspan.models.attention import packed_hidden, use_farspan_attention
from farspan.models.parts import trunk_and_head
from farspan.parallel.blockwise import Strategy
from farspan.parallel.layout import Layout
from farspan.parallel.strategy import lay_out
from farspan.parallel.whole import WholeSequence
from farspan.verify.cases import PACKED, SINGLE, Case, ProbeSequence, leak_positions, make_cases
from farspan.verify.reference import StepAnswer, whole_gradients
from farspan.verify.sharing import Sharing, share
from farspan.verify.shrink import small_model

LossMaker = Callable[[PreTrainedModel, int], nn.Module]
Shape = tuple[int, int, int, int, int]


def as_read(batch: PackedBatch) -> PackedBatch:
    """A packed batch as the reader gives it."""
    return batch


@dataclass(frozen=True)
class Subject:
    """What is examined: the pieces of a training step, each one replaceable. Travels to the ranks."""

    config: PretrainedConfig
    parallel: ParallelConfig
    make_loss: LossMaker
    share: Callable[[ParallelConfig], Sharing] = share
    read: Callable[[PackedBatch], PackedBatch] = as_read
    tile_tokens: int = 7


@dataclass(frozen=True)
class RankAnswer:
    """What one rank found. Logits are in global order, gradients are summed over ranks; both on rank 0 only."""

    logits: dict[str, Tensor]
    steps: dict[str, StepAnswer]
    leaks: dict[int, Tensor]
    bytes_sent: int
    shapes: list[Shape]


def probe_cases(parallel: ParallelConfig) -> tuple[Case, ...]:
    """The cases of a layout: the one without labels masks what the last rank of the true layout holds."""
    first = make_cases(parallel.sp, ())[0].sequences[0]
    layout = lay_out(parallel.strategy, parallel.layout, first.bounds[-1], parallel.sp, parallel.ulysses, first.bounds)
    return make_cases(parallel.sp, tuple(layout.index_of(parallel.sp - 1).tolist()))


def examine_rank(subject: Subject) -> RankAnswer:
    """Run every case on this rank of the default process group. Collective."""
    model = small_model(subject.config)
    use_farspan_attention(model)
    probe = _Probe(subject, model, subject.share(subject.parallel))
    cases = probe_cases(subject.parallel)
    packed = next(case for case in cases if case.name == PACKED).sequences[0]
    logits = {c.name: probe.logits(c.sequences[0]) for c in cases if c.name in (PACKED, SINGLE)}
    leaks = {at: probe.logits(packed, changed=at) for at in leak_positions(packed)}
    steps: dict[str, StepAnswer] = {}
    sent, shapes = 0, []
    for case in cases:
        before = probe.exchange.bytes_sent
        probe.watch.clear()
        steps[case.name] = probe.step(case)
        if case.name == PACKED:
            sent, shapes = probe.exchange.bytes_sent - before, list(probe.watch.shapes)
    if dist.get_rank() != 0:
        return RankAnswer({}, {}, {}, sent, shapes)
    return RankAnswer(logits, steps, leaks, sent, shapes)


@dataclass
class _Watch:
    """An attention that remembers the shapes it was given."""

    shapes: list[Shape] = field(default_factory=list)
    inner: Strategy | None = None

    def clear(self) -> None:
        self.shapes.clear()

    def __call__(self, q_tHD: Tensor, k_tGD: Tensor, v_tGC: Tensor, **rule: Any) -> Tensor:
        assert self.inner is not None, "an attention was set"
        self.shapes.append((q_tHD.shape[0], q_tHD.shape[1], k_tGD.shape[1], q_tHD.shape[2], v_tGC.shape[2]))
        return self.inner(q_tHD, k_tGD, v_tGC, **rule)


class _Probe:
    """One rank's side of a training step, made of the subject's pieces."""

    def __init__(self, subject: Subject, model: PreTrainedModel, sharing: Sharing) -> None:
        self.subject, self.model, self.sharing = subject, model, sharing
        self.exchange = sharing.ranks.all
        self.loss = subject.make_loss(model, subject.tile_tokens)
        self.vocab: int = model.config.get_text_config(decoder=True).vocab_size
        self.watch = _Watch()

    def logits(self, sequence: ProbeSequence, changed: int | None = None) -> Tensor:
        """logits_TV of a sequence in global order; collective."""
        shard, layout = self._shard(sequence.batch(self.vocab, changed))
        with torch.no_grad():
            attention = self.sharing.attention(layout, shard.bounds)
            whole = WholeSequence(shard.bounds, self.exchange, layout)
            hidden_tE = packed_hidden(self.model, shard.tokens_T, shard.positions_T, attention, whole)
            logits_tV = trunk_and_head(self.model)[1](hidden_tE).contiguous()
        parts = [torch.empty_like(logits_tV) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, logits_tV)
        logits_TV = torch.empty(sequence.bounds[-1], logits_tV.shape[1], dtype=logits_tV.dtype)
        for rank, part in enumerate(parts):
            logits_TV[layout.index_of(rank)] = part
        return logits_TV

    def step(self, case: Case) -> StepAnswer:
        """Loss and gradients of one optimizer step, summed over ranks; collective."""
        self.model.zero_grad(set_to_none=True)
        shards = [self._shard(self.subject.read(s.batch(self.vocab))) for s in case.sequences]
        num_labels = _summed(sum(((s.labels_T != IGNORED_LABEL).sum() for s, _ in shards), torch.zeros(())))
        total = torch.zeros((), dtype=torch.float64)
        for shard, layout in shards:
            self.watch.inner = self.sharing.attention(layout, shard.bounds)
            loss = self.loss(shard, self.watch, num_labels, WholeSequence(shard.bounds, self.exchange, layout))
            loss.backward()
            total = total + loss.detach()
        gradients = {name: _summed(g) for name, g in whole_gradients(self.model.named_parameters()).items()}
        return StepAnswer(_summed(total).item(), gradients)

    def _shard(self, batch: PackedBatch) -> tuple[ShardedBatch, Layout]:
        layout = self.sharing.lay_out(batch.num_tokens, batch.bounds)
        return layout.shard(batch, dist.get_rank()), layout


def _summed(value: Tensor) -> Tensor:
    total = value.detach().to(torch.float64).clone()
    dist.all_reduce(total)
    return total
