"""A running training proves its layout again, on its own weights (train.reprobe_every).

Shapes: T tokens of the probe, t tokens this rank holds, V vocabulary.

All ranks compute one small packed sequence as they train: forward and backward, and forward with one token changed in
each document. Rank 0 computes the same on its CPU in one plain process, document by document, by transformers alone.
Weights, gradients, random numbers and the cursor are afterwards what they were before.
It costs rank 0 a whole copy of the weights in the type they are kept in, on the CPU, gathered one weight at a time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from farspan.batch import ShardedBatch
from farspan.errors import TrainingError, VerifyError
from farspan.models.checkpoint import random_causal_lm
from farspan.parallel.layout import Layout
from farspan.parallel.whole import WholeSequence
from farspan.telemetry.events import LayoutProbed
from farspan.train.checkpoint import on_rank_0
from farspan.train.step import TrainStep
from farspan.verify.cases import ProbeSequence, leak_positions, make_cases, num_tokens
from farspan.verify.judge import Check
from farspan.verify.live import (
    HeadWatch,
    LiveAnswer,
    Objective,
    judge_leaks,
    judge_live,
    plain_answers,
    probed_weights,
)

_SHORTEST_RAGGED = 16


def probe_layout(step: TrainStep, done: int, compute: torch.dtype) -> LayoutProbed:
    """Probe between two steps, after `done` of them. Collective; every rank gets the same event.

    Raises:
        TrainingError: the model cannot be made again from its config in one process.
    """
    started = time.perf_counter()
    sequence = probe_sequence(step.mesh.sp, step.reader.plan.sequence_tokens)
    names = probed_weights(step.loss.model)
    with _as_found(step):
        got = _sharded_answer(step, sequence, names)
        after = {at: _head_rows(step, sequence, at) for at in leak_positions(sequence)}
    plain = _plain_model(step)
    objective = Objective(step.loss.label_smoothing, step.loss.z_loss)

    def judged() -> list[Check]:
        assert plain is not None, "rank 0 has the plain model"
        exact, own = plain_answers(plain, sequence, names, compute, objective)
        return [*judge_live(got, exact, own, compute), *judge_leaks(sequence, got.head_TV, after, compute)]

    checks = on_rank_0(judged)
    return LayoutProbed(
        step=done,
        seconds=time.perf_counter() - started,
        failed=tuple(_sentence(check) for check in checks if not check.passed),
        passed=tuple(_sentence(check) for check in checks if check.passed),
    )


def refuse_failed(probed: LayoutProbed) -> None:
    """Stop a run whose layout is no longer exact.

    Raises:
        VerifyError: what differs.
    """
    if probed.failed:
        raise VerifyError(
            f"after step {probed.step} the sharded run no longer equals one process: {'; '.join(probed.failed)}; go "
            "back to the last checkpoint and run farspan doctor on this config"
        )


def probe_sequence(num_ranks: int, longest: int) -> ProbeSequence:
    """Ragged documents of a length every layout of the run can cut."""
    total = min(num_tokens(num_ranks), longest)
    if total == num_tokens(num_ranks):
        return make_cases(num_ranks, ())[0].sequences[0]
    return ProbeSequence((0, 5, 6, total * 3 // 7, total) if total >= _SHORTEST_RAGGED else (0, total), seed=1)


@contextmanager
def _as_found(step: TrainStep) -> Iterator[None]:
    """Leave the model as it is between two steps: its mode, no gradients, sharded weights."""
    assert all(p.grad is None for p in step.loss.parameters()), "a probe runs between two steps"
    training, devices = step.loss.training, [step.device] if step.device.type == "cuda" else []
    step.loss.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        step.loss.train(training)
        for module in step.loss.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        # Only now: while weights are whole, the shards that hold the probe's gradients are not among the parameters.
        step.loss.zero_grad(set_to_none=True)


def _sharded_answer(step: TrainStep, sequence: ProbeSequence, names: list[str]) -> LiveAnswer:
    """Loss, head results and some gradients as training computes them; whole on rank 0 alone."""
    shard, layout = _shard(step, sequence, changed=None)
    # Every group of ranks computes the same sequence, and gradients are summed over all of them.
    num_labels = torch.tensor((sequence.bounds[-1] - len(sequence.bounds) + 1) * step.mesh.dp, device=step.device)
    attention = step.sequence.attention(layout, shard.bounds)
    with HeadWatch(step.loss.model) as head:
        loss = step.loss(shard, attention, num_labels, WholeSequence(shard.bounds, step.exchange, layout))
        head_TV = _in_order(step, layout, head.rows())
    loss.backward()
    total = loss.detach().double()
    dist.all_reduce(total, group=step.mesh.all.get_group())
    weights, gradients = dict(step.loss.model.named_parameters()), {}
    for name in names:
        gradient = weights[name].grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            if dist.get_rank() == 0:
                gradients[name] = whole.to("cpu", torch.float64)
    return LiveAnswer(total.item(), head_TV, gradients)


@torch.no_grad()
def _head_rows(step: TrainStep, sequence: ProbeSequence, changed: int) -> Tensor:
    shard, layout = _shard(step, sequence, changed)
    attention, whole = step.sequence.attention(layout, shard.bounds), WholeSequence(shard.bounds, step.exchange, layout)
    with HeadWatch(step.loss.model) as head:
        step.loss(shard, attention, torch.ones((), device=step.device), whole)
        return _in_order(step, layout, head.rows())


def _shard(step: TrainStep, sequence: ProbeSequence, changed: int | None) -> tuple[ShardedBatch, Layout]:
    batch = sequence.batch(step.loss.model.config.get_text_config(decoder=True).vocab_size, changed)
    layout = step.sequence.lay_out(batch.num_tokens, batch.bounds)
    shard = layout.shard(batch, step.exchange.rank)
    tokens_T, labels_T, positions_T = (x.to(step.device) for x in (shard.tokens_T, shard.labels_T, shard.positions_T))
    return ShardedBatch(tokens_T, labels_T, positions_T, shard.bounds), layout


def _in_order(step: TrainStep, layout: Layout, rows_tV: Tensor) -> Tensor:
    """[T, V] in global order on the first rank of a sequence; what it gives elsewhere is not read."""
    group, first = step.exchange.group, step.exchange.rank == 0
    rows_tV = rows_tV.contiguous()
    parts = [torch.empty_like(rows_tV) for _ in range(layout.num_ranks)] if first else None
    dist.gather(rows_tV, parts, group=group, group_dst=0)
    if parts is None:
        return rows_tV
    return layout.join([part.to("cpu", torch.float64) for part in parts])


def _plain_model(step: TrainStep) -> PreTrainedModel | None:
    """The model's own class with the live weights, on the CPU of rank 0; none elsewhere. Collective."""
    live, held = step.loss.model, list[PreTrainedModel]()
    kept = dict(live.named_parameters())

    def make() -> None:
        # A config of its own: choosing an attention for the copy must not choose it for the live model.
        plain = random_causal_lm(copy.deepcopy(live.config), 0).to(next(iter(kept.values())).dtype)
        wanted = dict(plain.named_parameters())
        if wanted.keys() != kept.keys():
            other = sorted(wanted.keys() ^ kept.keys())[0]
            raise TrainingError(
                f"train.reprobe_every: one plain process has other weights than this run ({other}); set it to 0"
            )
        held.append(plain)

    on_rank_0(make)
    for name, weight in kept.items():
        whole = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        if held:
            held[0].get_parameter(name).data.copy_(whole)
    return held[0] if held else None


def _sentence(check: Check) -> str:
    place = f" ({check.about})" if check.about else ""
    if check.allowed == 0:
        return f"{check.name}: {check.measured:g}, allowed 0{place}"
    return f"{check.name} {check.measured:.1e}, allowed {check.allowed:.1e}{place}"
