"""The loop: steps, checkpoints, the published model. Tells what happens through one callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from farspan.config.schema import RunConfig
from farspan.telemetry.events import EventBody, Note, RunFinished
from farspan.train.build import Training
from farspan.train.checkpoint import TrainState, load_newest, save_checkpoint, save_model
from farspan.train.reprobe import probe_layout, refuse_failed


def train(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> str:
    """Run to the last step; gives the URI of the published model. Collective: every rank calls it."""
    started, tokens = time.perf_counter(), 0
    first = _resume(training, config, tell)
    step = training.step
    for index in range(first, config.train.steps):
        report = step.run(index)
        tokens += report.tokens
        tell(report)
        done = index + 1
        # Before the checkpoint: what is published was proven.
        if config.train.reprobe_every and done % config.train.reprobe_every == 0:
            probed = probe_layout(step, done, training.compute)
            tell(probed)
            refuse_failed(probed)
        due = config.train.checkpoint_every and done % config.train.checkpoint_every == 0
        if due or done == config.train.steps:
            state = _state(training, done)
            tell(
                save_checkpoint(
                    config.output, step.loss, step.optimizer, state, training.tokenizer, training.certificate
                )
            )
    uri = save_model(config.output, step.loss, training.tokenizer)
    tell(RunFinished(steps=max(0, config.train.steps - first), tokens=tokens, seconds=time.perf_counter() - started))
    return uri


def _resume(training: Training, config: RunConfig, tell: Callable[[EventBody], None]) -> int:
    if not config.train.resume:
        return 0
    step = training.step
    found = load_newest(config.output, step.loss, step.optimizer, training.state)
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


def _state(training: Training, done: int) -> TrainState:
    return replace(training.state, step=done, cursor=training.step.cursor)
