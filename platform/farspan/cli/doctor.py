"""`farspan doctor`: prove a layout for a model before hours are spent on it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from farspan.config.check import check_run
from farspan.config.load import load_config, nearest
from farspan.config.schema import RunConfig
from farspan.errors import ConfigError, NotFoundError, StorageError
from farspan.storage.paths import absolute_uri

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from farspan.verify.certificate import Certificate


_LEAST_WIDTH = 130
_PROCESSES_PER_CPU = 8
# Only for the megabytes in the reason why a strategy was chosen.
_COMPUTE_BYTES = 2


def run_doctor(subject: str, overrides: list[str], *, as_json: bool, certificate: str | None) -> None:
    """Examine, print, write; exits with 1 when a check failed."""
    config = _run_config(subject, overrides)
    if certificate is not None:
        _refuse_unwritable(certificate)
    from farspan.plan.choose import choose_parallel
    from farspan.plan.facts import model_facts
    from farspan.train.loss import PackedLoss
    from farspan.verify.doctor import examine, same_layout
    from farspan.verify.probe import Subject

    model = _model_config(config)
    chosen = choose_parallel(config, model_facts(model), _COMPUTE_BYTES)
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    if chosen.reason is not None:
        console.print(f"parallel.strategy=auto is {chosen.parallel.strategy}: {chosen.reason}", markup=False)
    with console.status(f"examining a small copy of {model.model_type} on {config.parallel.sp} processes"):
        found = examine(Subject(model, same_layout(chosen.parallel), PackedLoss))
    show(found, as_json=as_json, file=certificate)


def show(found: Certificate, *, as_json: bool, file: str | None) -> None:
    """Write and print a certificate; one that did not pass ends the command with exit code 1."""
    if file is not None:
        Path(file).write_text(found.to_json(), encoding="utf-8")
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        _print(found, file)
    if not found.passed:
        raise typer.Exit(1)


def _run_config(subject: str, overrides: list[str]) -> RunConfig:
    """The run to examine: a YAML config, a model folder, or an architecture of transformers with its defaults."""
    if subject.endswith((".yaml", ".yml")):
        return _checked(load_config(RunConfig, subject, overrides))
    given = {item.partition("=")[0] for item in overrides}
    # There is no corpus and no run: what the config wants of them is filled in.
    filled = [] if "data.corpus" in given else ["data.corpus=none"]
    if not given & {"parallel.workers"}:
        sp = next((item.partition("=")[2] for item in overrides if item.startswith("parallel.sp=")), "2")
        filled += [f"parallel.workers={sp}", f"parallel.sp={sp}"]
    if "://" in subject or "/" in subject or Path(subject).is_dir():
        filled.append(f"model.source={absolute_uri(subject)}")
    else:
        _refuse_unknown_architecture(subject)
        filled.append(f"model.architecture={subject}")
    return _checked(load_config(RunConfig, None, [*filled, *overrides]))


def _checked(config: RunConfig) -> RunConfig:
    check_run(config)
    if config.parallel.hdp:
        raise ConfigError(
            "parallel.hdp", "must be false: a certificate is of the ranks of a mesh", True, "use parallel.hdp=false"
        )
    most = _PROCESSES_PER_CPU * (os.cpu_count() or 1)
    if config.parallel.sp > most:
        raise ConfigError(
            "parallel.sp",
            f"starts that many processes here, and this machine proves at most {most} in good time",
            config.parallel.sp,
            f"use parallel.sp={most}: more ranks run the same code, with more blocks",
        )
    if config.model.source is not None:
        config.model.source = absolute_uri(config.model.source)
    return config


def _refuse_unknown_architecture(name: str) -> None:
    from transformers import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        hint = nearest(name, list(CONFIG_MAPPING.keys()))
        raise ConfigError("MODEL", "must be a YAML config, a model folder or a model_type of transformers", name, hint)


def _refuse_unwritable(file: str) -> None:
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise NotFoundError(file, f"no folder {folder} to write the certificate to; create it first")
    if Path(file).is_dir():
        raise StorageError(file, "is a folder; name the file the certificate is written to")


def _model_config(config: RunConfig) -> PretrainedConfig:
    from farspan.train.build import model_config
    from farspan.verify.shrink import VOCAB

    with tempfile.TemporaryDirectory(prefix="farspan-doctor-") as scratch:
        return model_config(config, VOCAB, Path(scratch))


def _print(found: Certificate, file: str | None) -> None:
    # One line per check also where the output is a pipe: a terminal that is narrower wraps it itself.
    terminal = Console(highlight=False)
    console = Console(highlight=False, width=max(_LEAST_WIDTH, terminal.width))
    layout = ", ".join(f"{name} {value}" for name, value in found.layout.items())
    table = Table("check", "measured", "allowed", "", "where", title=f"{found.model_type}: {layout}", box=None)
    for check in found.checks:
        verdict = "[green]ok[/green]" if check.passed else "[bold red]FAIL[/bold red]"
        table.add_row(check.name, _number(check.measured), _number(check.allowed), verdict, check.about)
    console.print(table)
    failed = sum(not check.passed for check in found.checks)
    verdict = "every check passed" if found.passed else f"{failed} of {len(found.checks)} checks failed"
    console.print(verdict, style="green" if found.passed else "bold red")
    if file is not None:
        console.print(f"certificate: {file}", markup=False, soft_wrap=True)


def _number(value: float) -> str:
    return f"{value:.0f}" if value in (0.0, float("inf")) or value >= 1 else f"{value:.0e}"
