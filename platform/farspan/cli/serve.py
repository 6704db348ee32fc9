"""`farspan serve`."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import typer
from rich.console import Console

from farspan.config.check import check_serve
from farspan.config.load import dump_config, load_config, written_keys
from farspan.config.schema import ServeConfig
from farspan.storage.paths import absolute_uri


def run_serve(path: str, overrides: list[str], *, dry_run: bool) -> None:
    """Serve a config until Ctrl-C."""
    config = load_config(ServeConfig, path, overrides)
    check_serve(config)
    config.model = absolute_uri(config.model)
    config.engine.adapters = _placed(config.engine.adapters, Path(path).parent, overrides)
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        return
    from farspan.jobs.launch import local_ray
    from farspan.serve.app import check_app, num_cpus, run_app

    # This command says itself when it is ready; Serve's own lines would say it twice.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    console = Console(highlight=False, soft_wrap=True)
    # Before Ray is started: a folder that cannot be served is refused in a second, not in twenty.
    check_app(config)
    console.print(
        f"starting {config.prefill.replicas} prefill and {config.decode.replicas} decode workers for {config.model}",
        markup=False,
    )
    with local_ray(num_cpus(config) + 1), run_app(config) as running:
        console.print(f"ready: {running.url}  model {running.model}  key file {running.api_key_file}", markup=False)
        console.print("Ctrl-C stops it", markup=False)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("stopping", markup=False)


def _placed(adapters: dict[str, str], beside: Path, overrides: list[str]) -> dict[str, str]:
    """Folders of adapters for workers, which run elsewhere: a file's are relative to the file, typed ones to here."""
    typed = written_keys(None, overrides)
    return {
        name: absolute_uri(folder if "://" in folder or f"engine.adapters.{name}" in typed else _join(beside, folder))
        for name, folder in adapters.items()
    }


def _join(beside: Path, folder: str) -> str:
    return str(beside / Path(folder).expanduser())
