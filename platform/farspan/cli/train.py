"""`farspan train` and `farspan plan`."""

from __future__ import annotations

import shlex
import signal
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from farspan.cli.choose import Chosen, choose_plan
from farspan.config.check import check_run
from farspan.config.load import dump_config, load_config, written_keys
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError, StorageError
from farspan.plan.run_plan import RunPlan
from farspan.storage.paths import LocalPlace, absolute_uri, parse_uri
from farspan.telemetry.events import EventBody, StepReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig

if TYPE_CHECKING:
    from farspan.cli.curves import Curves
    from farspan.cli.progress import TrainProgress
    from farspan.jobs.progress import StopWish

STOPPED = 143
"""Exit code of a run that was asked to stop and did, as a shell names the end by SIGTERM."""


def show_plan(path: str, overrides: list[str]) -> None:
    """Print the plan of a config."""
    chosen = _read_and_choose(path, overrides)
    print_plan([*plan_of(chosen.config).lines(), *chosen.lines])


def run_train(path: str, overrides: list[str], *, dry_run: bool, cluster: str | None, join: bool) -> None:
    """Run a training config here, or hand it to a cluster."""
    if cluster is not None:
        from farspan.cli.submission import submit_run

        submit_run(path, overrides, cluster, dry_run=dry_run)
        return
    chosen = _read_and_choose(path, overrides)
    config, plan = chosen.config, plan_of(chosen.config)
    config.parallel, lines = plan.parallel, [*plan.lines(), *chosen.lines]
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        print_plan(lines)
        return
    if join:
        _refuse_passing(config.output)
    try:
        _run(chosen, config, lines, join=join)
    except KeyboardInterrupt:
        _tell_way_on(config, [path, *overrides, *(["--join"] if join else [])])
        raise


def _run(chosen: Chosen, config: RunConfig, lines: list[tuple[str, str]], *, join: bool) -> None:
    from farspan.cli.record import run_log
    from farspan.cli.report import reported
    from farspan.jobs.launch import joined_ray, local_ray
    from farspan.jobs.progress import StopWish
    from farspan.jobs.train import run_training

    print_plan(lines)
    resources = config.resources
    cpus = resources.cpus_per_worker * config.parallel.workers
    gpus = resources.gpus_per_worker * config.parallel.workers
    ray_here = joined_ray() if join else local_ray(cpus, gpus)
    wish, seconds = StopWish(), list[float]()
    board = curves_of(config)
    with (
        run_log(config.output) as log,
        reported(log, config.output),
        progress_of(config) as progress,
        board,
        ray_here,
        stop_on_sigterm(wish),
    ):

        def tell(body: EventBody) -> None:
            if isinstance(body, StepReport):
                seconds.append(body.step_s)
            progress.show(log.append(body))
            board.record(body)

        uri = run_training(config, lines, tell, wish, chosen.predicted, own_ray=not join)
    console = Console(highlight=False, soft_wrap=True)
    if uri is None:
        console.print(f"stopped ({wish.reason}); start it again to go on from its newest checkpoint", markup=False)
        raise typer.Exit(STOPPED)
    if chosen.predicted is not None and seconds:
        said, found = chosen.predicted.step_s, statistics.median(seconds)
        text = f"a step took {found:.3g} s (median), {said:.3g} s were predicted ({(said - found) / found:+.0%})"
        console.print(text, markup=False)
    console.print(f"model published: {uri}", markup=False)


def _read_and_choose(path: str, overrides: list[str]) -> Chosen:
    config = read_run_config(path, overrides)
    if config.plan.choose == "never" or (config.resources.gpus_per_worker == 0 and config.plan.choose != "always"):
        return Chosen(config)
    with Console(stderr=True).status("choosing a plan"):
        return choose_plan(config, written_keys(path, overrides), model_of(config))


def model_of(config: RunConfig) -> PretrainedConfig:
    """The model's config, with the corpus's vocabulary where it is made from scratch."""
    from farspan.data.reader import read_corpus_manifest
    from farspan.models.attention import refuse_unsupported
    from farspan.train.build import model_config

    vocab_size = read_corpus_manifest(config.data.corpus).vocab_size
    with tempfile.TemporaryDirectory(prefix="farspan-plan-") as scratch:
        model = model_config(config, vocab_size, Path(scratch))
    refuse_unsupported(model)
    return model


def progress_of(config: RunConfig) -> TrainProgress:
    """What the terminal shows of a run."""
    from farspan.cli.progress import TrainProgress

    return TrainProgress(config.train.steps, config.resources.price_per_gpu_hour, config.parallel.workers)


def curves_of(config: RunConfig) -> Curves:
    """Where TensorBoard reads the run's numbers, if that was asked for."""
    from farspan.cli.curves import Curves

    return Curves(config.output if config.telemetry.tensorboard else None)


@contextmanager
def stop_on_sigterm(wish: StopWish) -> Iterator[None]:
    """The first SIGTERM asks for a checkpoint and a clean end; another one interrupts at once, like Ctrl-C.

    Inside a Ray that was started before: starting it takes the signal for itself.
    """

    def asked(_signal: int, _frame: FrameType | None) -> None:
        if wish.reason is not None:
            raise KeyboardInterrupt
        wish.ask("SIGTERM")

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_run_config(path: str, overrides: list[str]) -> RunConfig:
    """A checked run config whose local paths do not depend on where a worker stands."""
    config = load_config(RunConfig, path, overrides)
    check_run(config)
    config.output = absolute_uri(config.output)
    config.data.corpus = absolute_uri(config.data.corpus)
    if config.model.source is not None:
        config.model.source = absolute_uri(config.model.source)
    if config.train.certificate is not None:
        config.train.certificate = absolute_uri(config.train.certificate)
    if config.memory.speeds is not None:
        config.memory.speeds = absolute_uri(config.memory.speeds)
    return config


def plan_of(config: RunConfig) -> RunPlan:
    """The plan of a run; opens the corpus's manifest and the model's config, and traces a layer where it must."""
    import torch

    from farspan.models.lora import count_matrices
    from farspan.plan.facts import model_facts
    from farspan.plan.run_plan import plan_run
    from farspan.train.build import compute_dtype, required_certificate
    from farspan.train.tiers import plan_tiers

    model = model_of(config)
    device = torch.device("cuda" if config.resources.gpus_per_worker > 0 else "cpu")
    num_adapter = count_matrices(model, config.lora) if config.lora.rank > 0 else 0
    compute = compute_dtype(config.model.dtype, device)
    plan = plan_run(config, model_facts(model), compute.itemsize, num_adapter)
    required_certificate(config, model, plan.parallel)
    return plan_tiers(config, model, plan, compute, on_gpu=device.type == "cuda")


def _refuse_passing(output: str) -> None:
    from farspan.jobs.launch import is_passing

    place = parse_uri(output)
    if isinstance(place, LocalPlace) and is_passing(place.folder):
        raise ConfigError(
            "output", "must outlive the folder that came with the job", output, "use an absolute path or s3://BUCKET"
        )


def _tell_way_on(config: RunConfig, words: list[str]) -> None:
    """After an interrupt: where the run stands, and the command that goes on from there."""
    from farspan.train.checkpoint import list_checkpoints

    try:
        newest = next(iter(list_checkpoints(config.output)), None)
        stands = "no checkpoint was published yet" if newest is None else f"newest checkpoint: {newest}"
    except StorageError as problem:
        stands = f"its newest checkpoint is not known ({problem})"
    if not config.train.resume:
        words = [*(word for word in words if not word.startswith("train.resume=")), "train.resume=true"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{stands}; go on with: farspan train {shlex.join(words)}", markup=False)


def print_plan(lines: list[tuple[str, str]]) -> None:
    """Print rows of (what, how much and why)."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("plan", style="bold")
    for what, text in lines:
        console.print(f"  {what:16} {text}", markup=False)
