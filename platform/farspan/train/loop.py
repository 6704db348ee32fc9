"""The loop: steps, checkpoints, the published model. Tells what happens through one callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from farspan.config.schema import RunConfig
from farspan.storage.patience import patiently
from farspan.telemetry.events import EventBody, Note, RunFinished, RunPreempted, StepReport
from farspan.train.boundary import Boundary
from farspan.train.build import Training
from farspan.train.checkpoint import TrainState, load_newest, newest_step, on_rank_0, save_model
from farspan.train.outside import NothingOutside, Outside
from farspan.train.reprobe import probe_layout, refuse_failed
from farspan.train.rescue import Rescue, load_rescue
from farspan.train.samples import Place, Seen, chain_samples, refuse_uneven
from farspan.train.saver import Saver
from farspan.train.useful import peak_flops


def train(
    training: Training, config: RunConfig, tell: Callable[[EventBody], None], outside: Outside | None = None
) -> str | None:
    """Run to the last step; gives the URI of the published model, or None when the run was asked to stop before.

    Collective: every rank calls it.
    """
    try:
        uri = _train(training, config, tell, outside or NothingOutside())
    except BaseException as first:
        # What went wrong first is what the caller must see: running out of memory is answered with another plan.
        try:
            training.step.close()
        except Exception as second:
            first.add_note(f"closing the run failed too: {second}")
        raise
    training.step.close()
    return uri


def _train(training: Training, config: RunConfig, tell: Callable[[EventBody], None], outside: Outside) -> str | None:
    started, tokens = time.perf_counter(), 0
    first = _resume(training, config, tell)
    _tell_all(tell, [Note(text=text) for text in training.notes])
    step, boundary, saver = training.step, Boundary(outside), _saver(training, config)
    peak, peak_source = peak_flops(config, step.device)
    if peak > 0:
        tell(Note(text=f"utilization is of {peak / 1e12:g} TFLOP/s a device ({peak_source})"))
    elif step.device.type == "cuda":
        tell(Note(text=f"utilization is not known: {peak_source}"))
    with _rescue(config) as rescue:
        rescue.at_boundary(training.state, _held(training, config))
        for index in range(first, config.train.steps):
            report = step.run(index, rescue.moving)
            met = boundary.meet(step.reader, saver.trouble())
            refuse_uneven(met.seen, report.tokens)
            _advance(training, index + 1, met.seen)
            state = training.state
            tokens += report.tokens
            tell(_with_work(report, met.seen, state, peak))
            rescue.at_boundary(state, _held(training, config))
            # Before the checkpoint: what is published was proven.
            if config.train.reprobe_every and state.step % config.train.reprobe_every == 0:
                probed = probe_layout(step, state.step, training.compute)
                tell(probed)
                refuse_failed(probed)
            if met.stop is not None or is_due(config, state.step):
                # Steps a checkpoint covers are never done again: nobody could tell of them a second time.
                outside.settle()
                saver.save(state)
            _tell_all(tell, saver.news())
            if met.stop is not None and state.step < config.train.steps:
                saver.finish()
                _tell_all(tell, saver.news())
                tell(RunPreempted(step=state.step, reason=met.stop))
                return None
        saver.finish()
        _tell_all(tell, saver.news())
    patience_s = config.resources.timeout_s / 2
    uri = save_model(config.output, step.weights, training.tokenizer, training.adapter, patience_s)
    tell(RunFinished(steps=max(0, config.train.steps - first), tokens=tokens, seconds=time.perf_counter() - started))
    return uri


def is_due(config: RunConfig, done: int) -> bool:
    """Whether a checkpoint is published after `done` steps."""
    every = config.train.checkpoint_every
    return done == config.train.steps or (every > 0 and done % every == 0)


def _saver(training: Training, config: RunConfig) -> Saver:
    return Saver(
        config=config,
        engine=training.step.weights,
        tokenizer=training.tokenizer,
        board=dist.distributed_c10d._get_default_store(),
        certificate=training.certificate,
        adapter=training.adapter,
        plan=training.plan,
    )


def _with_work(report: StepReport, seen: dict[Place, Seen], state: TrainState, peak: float) -> StepReport:
    flops = sum(one.flops for one in seen.values())
    could = peak * dist.get_world_size() * report.step_s
    utilization = flops / could if could > 0 else 0.0
    return replace(report, samples=state.samples, model_flops=flops, utilization=utilization)


def _tell_all(tell: Callable[[EventBody], None], bodies: list[EventBody]) -> None:
    for body in bodies:
        tell(body)


def _advance(training: Training, done: int, seen: dict[Place, Seen]) -> None:
    samples = chain_samples(training.state.samples, seen)
    training.state = replace(training.state, step=done, cursor=training.step.cursor, samples=samples)


def _resume(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> int:
    step = training.step
    rescued = _resume_rescued(training, config)
    if rescued is not None:
        training.state = rescued
        tell(Note(text=f"goes on from what was put aside after step {rescued.step}"))
        return rescued.step
    if not config.train.resume:
        return 0
    found = load_newest(config.output, step.weights, training.state, training.adapter, config.resources.timeout_s / 2)
    if found is None:
        return 0
    for reason in found.skipped:
        tell(Note(text=reason))
    state = training.state = found.state
    step.cursor = state.cursor
    tell(Note(text=f"resumed after step {state.step}, {state.cursor} sequences consumed"))
    if state.step >= config.train.steps:
        tell(Note(text=f"train.steps={config.train.steps} is already reached; raise it to go on"))
    return state.step


def _rescue(config: RunConfig) -> Rescue:
    return Rescue(
        output=config.output,
        store=dist.distributed_c10d._get_default_store(),
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
    )


def _held(training: Training, config: RunConfig) -> dict[str, Tensor]:
    return training.step.weights.held() if config.memory.step_down else {}


def _resume_rescued(training: Training, config: RunConfig) -> TrainState | None:
    """Put back what every rank put aside at one boundary, unless a checkpoint is newer. Collective."""
    output, patience_s = config.output, config.resources.timeout_s / 2
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine = patiently(lambda: load_rescue(output, rank, num_ranks, training.state), output, patience_s)
    steps: list[Any] = [None] * num_ranks
    dist.all_gather_object(steps, None if mine is None else mine[0].step)
    # A run that starts over is not behind the checkpoints of an older one.
    newest = 0
    if config.train.resume:
        newest = on_rank_0(lambda: patiently(lambda: newest_step(output), output, patience_s))
    if mine is None or len(set(steps)) != 1 or mine[0].step < newest:
        return None
    state, shards = mine
    training.step.weights.put_back(shards)
    training.step.cursor = state.cursor
    return state
