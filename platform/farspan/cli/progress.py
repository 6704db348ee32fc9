"""What a long command shows while it works: one line per step on a pipe, a live bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from farspan.telemetry.cost import cost, price_per_million
from farspan.telemetry.events import (
    CheckpointPublished,
    Event,
    LayoutProbed,
    Note,
    PlanSteppedDown,
    RunFinished,
    RunPreempted,
    RunResized,
    RunRestarted,
    StepReport,
)
from farspan.telemetry.tiers import held_beside
from farspan.telemetry.units import byte_size, duration

# Off a terminal, a batch says so often how far it is.
_BATCH_EVERY_S = 5.0


class _Live:
    """A rich progress bar on a terminal; nothing but printed lines elsewhere."""

    def __init__(self, *columns: Any) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def __enter__(self) -> Any:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class TrainProgress(_Live):
    """Steps of a training run."""

    def __init__(self, num_steps: int, price_per_worker_hour: float = 0.0, workers: int = 1) -> None:
        """`price_per_worker_hour` 0: no cost is shown."""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        self._num_steps, self._price, self._workers = num_steps, price_per_worker_hour, workers
        self._task = self._bar.add_task("starting workers", total=num_steps)

    def show(self, event: Event) -> None:
        """Tell the user about one event."""
        body = event.body
        if isinstance(body, StepReport):
            self._bar.update(self._task, completed=body.step, description=f"loss {body.loss:.4f}")
            shown = [
                f"{tier} {byte_size(size)}" for tier, size in {"device": body.device_bytes, **held_beside(body)}.items()
            ]
            if body.exposed_max_s > 0:
                shown.append(f"exposed {duration(body.exposed_s)} (max {duration(body.exposed_max_s)})")
            if body.utilization > 0:
                shown.append(f"utilization {body.utilization:.1%}")
            if self._price > 0:
                shown.append(f"{price_per_million(self._price, self._workers, body.tokens_per_s):.3g} per M tokens")
            self.console.print(
                f"step {body.step:>5}/{self._num_steps}  loss {body.loss:8.4f}  {body.tokens_per_s:>9,.0f} tokens/s  "
                f"lr {body.learning_rate:.2e}  grad {body.grad_norm:.2f}  " + "  ".join(shown)
            )
        elif isinstance(body, CheckpointPublished):
            self.console.print(f"checkpoint after step {body.step}: {body.uri} ({body.seconds:.1f} s)", markup=False)
        elif isinstance(body, LayoutProbed):
            verdict = (
                f"FAILED: {'; '.join(body.failed)}" if body.failed else f"{len(body.passed)} checks equal one process"
            )
            self.console.print(f"layout probed after step {body.step}: {verdict} ({body.seconds:.1f} s)", markup=False)
        elif isinstance(body, PlanSteppedDown):
            self.console.print(f"step {body.step} did not fit ({body.reason}): now {body.change}", markup=False)
        elif isinstance(body, RunRestarted):
            text = f"goes on after step {body.step} ({body.redone} steps done again): {body.reason}"
            self.console.print(text, markup=False)
        elif isinstance(body, RunPreempted):
            self.console.print(f"stopped after step {body.step}, checkpoint published: {body.reason}", markup=False)
        elif isinstance(body, RunResized):
            self._workers = body.workers
            text = f"{body.workers} workers from step {body.step + 1}, accumulation {body.accumulation}: {body.reason}"
            self.console.print(text, markup=False)
        elif isinstance(body, Note):
            self.console.print(body.text, markup=False)
        elif isinstance(body, RunFinished):
            self.console.print(f"{body.steps} steps, {body.tokens:,} tokens in {body.seconds:.1f} s")
            if self._price > 0:
                spent = cost(self._price, self._workers * body.seconds)
                per_worker = body.tokens / max(body.seconds, 1e-9) / self._workers
                self.console.print(f"cost {spent:.3g}, {per_worker:,.0f} tokens/s per worker")


class BuildProgressBar(_Live):
    """Documents of a corpus."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} files, {task.fields[records]:,} documents"),
        )
        self._task: Any = None

    def __call__(self, progress: Any) -> None:
        """One BuildProgress from the corpus room."""
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.total_files, records=0)
        self._bar.update(
            self._task,
            description=progress.stage,
            completed=progress.files,
            total=progress.total_files,
            records=progress.documents,
        )

    def finish(self, manifest: Any, output: str) -> None:
        """The last lines."""
        self.console.print(
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards)} shards: {output}",
            markup=False,
        )
        for entry in manifest.skipped:
            named = ", ".join(entry.examples[:2]) + (", ..." if entry.documents > 2 else "")
            self.console.print(f"  left out: {entry.documents} ({entry.reason}): {named}", markup=False)
        if manifest.rule.split:
            self.console.print(f"  cut: {manifest.rule.split} longer than {manifest.rule.split_tokens} tokens")


class BatchProgressBar(_Live):
    """Prompts of a batch: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._task: Any = None
        self._clock = clock
        self._began_s = self._told_s = 0.0

    def __call__(self, progress: Any) -> None:
        """One Progress from the engine room; the first before anything is answered."""
        now_s = self._clock()
        if self._task is None:
            self._began_s = self._told_s = now_s
            # Only now: what was there already is no speed.
            self._task = self._bar.add_task("", total=progress.total, completed=progress.done)
        text = self._told(progress, now_s - self._began_s)
        self._bar.update(self._task, completed=progress.done, description=text)
        if not self.console.is_terminal and now_s - self._told_s >= _BATCH_EVERY_S:
            self._told_s = now_s
            self.console.print(text, markup=False)

    def _told(self, progress: Any, passed_s: float) -> str:
        text = f"{progress.done:,} of {progress.total:,} lines, {progress.failed:,} failed"
        if progress.skipped:
            text += f", {progress.skipped:,} were there already"
        return f"{text}, {progress.tokens / max(passed_s, 1e-9):,.0f} tokens/s"

    def finish(self, progress: Any, output: str) -> None:
        """The last lines."""
        text = f"{progress.answered:,} answers, {progress.tokens:,} tokens: {output}"
        if progress.drafted.proposed:
            text += f"; {progress.drafted.accepted:,} of {progress.drafted.proposed:,} guessed tokens were right"
        if progress.skipped:
            text += f"; {progress.skipped:,} were there already"
        if progress.failed:
            text += f"; {progress.failed:,} lines have an error instead"
        self.console.print(text, markup=False)
