"""The loop: steps, checkpoints, the published model. Tells what happens through one callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from farspan.config.schema import RunConfig
from farspan.telemetry.events import EventBody, Note, RunFinished
from farspan.train.build import Training
from farspan.train.checkpoint import TrainState, load_newest, newest_step, on_rank_0, save_checkpoint, save_model
from farspan.train.reprobe import probe_layout, refuse_failed
from farspan.train.rescue import Rescue, clear_rescue, load_rescue


def train(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> str:
    """Run to the last step; gives the URI of the published model. Collective: every rank calls it."""
    try:
        uri = _train(training, config, tell)
    except BaseException as first:
        # What went wrong first is what the caller must see: running out of memory is answered with another plan.
        try:
            training.step.close()
        except Exception as second:
            first.add_note(f"closing the run failed too: {second}")
        raise
    training.step.close()
    return uri


def _train(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> str:
    started, tokens = time.perf_counter(), 0
    first = _resume(training, config, tell)
    step = training.step
    with _rescue(config) as rescue:
        rescue.at_boundary(_state(training, first), _held(training, config))
        for index in range(first, config.train.steps):
            report = step.run(index, rescue.moving)
            tokens += report.tokens
            tell(report)
            state = _state(training, index + 1)
            rescue.at_boundary(state, _held(training, config))
            # Before the checkpoint: what is published was proven.
            if config.train.reprobe_every and state.step % config.train.reprobe_every == 0:
                probed = probe_layout(step, state.step, training.compute)
                tell(probed)
                refuse_failed(probed)
            due = config.train.checkpoint_every and state.step % config.train.checkpoint_every == 0
            if due or state.step == config.train.steps:
                tell(
                    save_checkpoint(
                        config.output, step.weights, state, training.tokenizer, training.certificate, training.adapter
                    )
                )
                on_rank_0(lambda: clear_rescue(config.output))
    uri = save_model(config.output, step.weights, training.tokenizer, training.adapter)
    tell(RunFinished(steps=max(0, config.train.steps - first), tokens=tokens, seconds=time.perf_counter() - started))
    return uri


def _resume(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> int:
    step = training.step
    rescued = _resume_rescued(training, config)
    if rescued is not None:
        tell(Note(text=f"goes on from what was put aside after step {rescued.step}"))
        return rescued.step
    if not config.train.resume:
        return 0
    found = load_newest(config.output, step.weights, training.state, training.adapter)
    if found is None:
        return 0
    for reason in found.skipped:
        tell(Note(text=reason))
    state = found.state
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
    mine = load_rescue(config.output, dist.get_rank(), dist.get_world_size(), training.state)
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, None if mine is None else mine[0].step)
    # A run that starts over is not behind the checkpoints of an older one.
    newest = on_rank_0(lambda: newest_step(config.output)) if config.train.resume else 0
    if mine is None or len(set(steps)) != 1 or mine[0].step < newest:
        return None
    state, shards = mine
    training.step.weights.put_back(shards)
    training.step.cursor = state.cursor
    return state


def _state(training: Training, done: int) -> TrainState:
    return replace(training.state, step=done, cursor=training.step.cursor)
