"""`farspan plan ... --gpu`: find the way to train a model on a machine, and say what it costs and why."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from farspan.cli.plan_page import show_found
from farspan.config.check import check_run
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError, PlanError
from farspan.plan.cost import Task
from farspan.plan.explain import report_dict
from farspan.plan.machine import Machine, calibrated, parse_machine, save_calibration
from farspan.plan.run_plan import passes_of
from farspan.plan.search import Space, fewest_nodes, limit_of, longest, search
from farspan.storage.paths import absolute_uri

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST_TOKENS = 1 << 30
_MORE_NODES = 8
_SUFFIXES = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asked the planner."""

    config: str | None
    overrides: list[str]
    gpu: str
    tokens: int | None
    nodes: int = 1
    model: str | None = None
    host_gib: float | None = None
    memory_gib: float | None = None
    cxl_gib: float = 0.0
    nvme_gib: float = 0.0
    calibration: str | None = None
    optimizer: str = "adamw"
    lora_rank: int = 0


def run_planner(question: Question, *, explain: bool, as_json: bool, top: int) -> None:
    """Trace, search and print.

    Raises:
        ConfigError: something the user wrote.
        PlanError: nothing fits; the message names what would.
    """
    machine = _machine(question)
    space = _space(question)
    config, tokens = _run_config(question)
    space = replace(space, swap_share=config.memory.swap_share)
    task = _task(config, machine, tokens)
    found = search(task, space)
    best = found.best
    limit = None if best is None else limit_of(task, best.choice)
    if as_json:
        typer.echo(json.dumps(report_dict(task, found, limit, top), indent=1))
    else:
        console = Console(highlight=False)
        show_found(console, task, found, limit, explain=explain, top=top)
    if best is None:
        raise PlanError(_way_out(task, space))


def run_calibrate(file: str) -> None:
    """Measure this machine and keep what was found."""
    from farspan.plan.calibrate import this_machine

    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise ConfigError("--calibrate", "must lie in a folder that exists", file, f"create {path.absolute().parent}")
    with Console(stderr=True).status("measuring products, attention and copies"):
        machine = this_machine()
    save_calibration(path, machine)
    shares = machine.efficiency
    console = Console(highlight=False)
    console.print(f"{machine.text()}", markup=False)
    sheet = machine.device
    for name, value in (
        ("matrix products", f"{shares.gemm * sheet.flops / 1e12:,.2f} TFLOP/s"),
        ("attention", f"{shares.attention * sheet.flops / 1e12:,.2f} TFLOP/s"),
        ("device memory", f"{shares.memory * sheet.memory_bandwidth / 1e9:,.1f} GB/s"),
        ("between devices", f"{shares.node * sheet.node_bandwidth / 1e9:,.1f} GB/s"),
        ("to host memory", f"{shares.host_link * sheet.host_link / 1e9:,.1f} GB/s"),
    ):
        console.print(f"  {name:16} {value}", markup=False)
    console.print(f"saved: {file}; use it with --calibration {file}", markup=False, soft_wrap=True)


def parse_tokens(text: str, option: str = "--seq") -> int:
    """`131072`, `128K` (1024 each) or `1M` -> tokens.

    Raises:
        ConfigError: not a number of tokens.
    """
    plain = text.strip().lower().replace("_", "").replace(",", "")
    factor = _SUFFIXES.get(plain[-1:], 1)
    try:
        tokens = float(plain[:-1] if factor > 1 else plain) * factor
    except ValueError:
        raise ConfigError(
            option, "must be a number of tokens, such as 131072, 128K or 1M", text, f"use {option} 128K"
        ) from None
    if not (2 <= tokens <= _MOST_TOKENS):
        near = "2" if tokens < 2 else "1024M"
        raise ConfigError(option, f"must lie in 2..{_MOST_TOKENS:,} tokens", text, f"use {option} {near}")
    if tokens != int(tokens):
        raise ConfigError(option, "must be a whole number of tokens", text, f"use {option} {int(tokens)}")
    return int(tokens)


def _machine(question: Question) -> Machine:
    name, _, count = question.gpu.lower().partition(":")
    if name == "cpu":
        from farspan.plan.calibrate import cpu_machine

        if count and not (count.isdigit() and int(count) > 0):
            raise ConfigError("--gpu", "must end in a number of processes", question.gpu, "use --gpu cpu:2")
        return replace(cpu_machine(int(count or 1)), nodes=question.nodes)
    machine = parse_machine(
        question.gpu,
        question.nodes,
        host_gib=question.host_gib,
        cxl_gib=question.cxl_gib,
        nvme_gib=question.nvme_gib,
        memory_gib=question.memory_gib,
    )
    return machine if question.calibration is None else calibrated(machine, Path(question.calibration))


def _run_config(question: Question) -> tuple[RunConfig, int]:
    """The run config the model and the length come from."""
    overrides = list(question.overrides)
    if question.model is not None:
        is_folder = "/" in question.model or "://" in question.model or Path(question.model).is_dir()
        # What has no section is a field of the model's config.
        fields = [item if "." in item.partition("=")[0] else f"model.settings.{item}" for item in overrides]
        subject = (
            f"model.source={absolute_uri(question.model)}" if is_folder else f"model.architecture={question.model}"
        )
        overrides = ["data.corpus=none", subject, *fields]
    elif question.config is None:
        raise ConfigError("CONFIG", "must be given, or --model", None, "try farspan plan --model llama --gpu h100:8")
    else:
        overrides = ["data.corpus=none", *overrides] if _without_corpus(question.config, overrides) else overrides
    config = load_config(RunConfig, question.config, overrides)
    check_run(config)
    if config.model.source is not None:
        config.model.source = absolute_uri(config.model.source)
    tokens = question.tokens or config.data.sequence_tokens
    return config, tokens


def _without_corpus(path: str, overrides: list[str]) -> bool:
    """A plan needs no data: a config that names no corpus yet is as good."""
    import yaml

    file = Path(path)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    named = isinstance(content, dict) and isinstance(content.get("data"), dict) and "corpus" in content["data"]
    return file.is_file() and not named and not any(item.startswith("data.corpus=") for item in overrides)


def _task(config: RunConfig, machine: Machine, tokens: int) -> Task:
    from farspan.models.attention import refuse_unsupported
    from farspan.plan.exchange import ways_of
    from farspan.plan.trace import trace_model

    with Console(stderr=True).status("tracing the model"):
        model = _model(config, tokens)
        refuse_unsupported(model)
        profile = trace_model(model)
    # Also of the larger machines that are looked at when nothing fits on this one.
    largest = _MORE_NODES * machine.num_devices
    sizes = [n for n in range(1, largest + 1) if largest % n == 0]
    return Task(profile, machine, tokens, ways_of(profile, sizes), passes_of(config))


def _model(config: RunConfig, tokens: int) -> PretrainedConfig:
    from farspan.train.build import model_config

    if config.model.source is None:
        config = replace(config, data=replace(config.data, sequence_tokens=tokens))
    with tempfile.TemporaryDirectory(prefix="farspan-plan-") as scratch:
        return model_config(config, None, Path(scratch))


def _space(question: Question) -> Space:
    known = ("adamw", "adamw8bit")
    if question.optimizer not in known:
        raise ConfigError(
            "--optimizer", f"must be one of {', '.join(known)}", question.optimizer, "use --optimizer adamw"
        )
    return Space(optimizers=(question.optimizer,), lora_rank=question.lora_rank)


def _way_out(task: Task, space: Space) -> str:
    devices = task.machine.num_devices
    text = f"{task.tokens:,} tokens of {task.profile.name} do not fit on {devices} x {task.machine.device.name}"
    ways = []
    most = longest(task, space)
    if most is not None:
        ways.append(f"--seq {most[0]} ({most[1].sharing_text()}, {most[1].memory_text()})")
    nodes = fewest_nodes(task, space, most=_MORE_NODES * task.machine.nodes)
    if nodes is not None:
        ways.append(f"--nodes {nodes[0]}")
    if "adamw8bit" not in space.optimizers and search(task, replace(space, optimizers=("adamw8bit",))).plans:
        ways.append("--optimizer adamw8bit")
    return f"{text}; nearest that does: {' or '.join(ways)}" if ways else f"{text}, nor does any shorter sequence"
