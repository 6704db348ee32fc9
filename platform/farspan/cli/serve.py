"""`farspan serve`."""

from __future__ import annotations

import logging
import os
import queue
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from farspan.config.load import dump_config, load_config, written_keys
from farspan.config.schema import ServeConfig
from farspan.config.serve_rules import check_serve
from farspan.errors import FarspanError
from farspan.storage.paths import absolute_uri

if TYPE_CHECKING:
    from farspan.serve.app import Running


def run_serve(
    paths: Sequence[str], overrides: list[str], *, dry_run: bool, cluster: str | None = None, join: str | None = None
) -> None:
    """Serve the model of each config until Ctrl-C, here or, with `join` (a key file), on the Ray this process belongs
    to; or hand them to a cluster."""
    configs = _load(paths, overrides)
    for config in configs:
        check_serve(config)
    if dry_run:
        typer.echo("---\n".join(map(dump_config, configs)), nl=False)
        return
    if cluster is not None:
        from farspan.cli.serve_cluster import deploy

        deploy(configs, cluster)
        return
    from farspan.jobs.launch import joined_ray, local_ray
    from farspan.serve.app import check_app, num_cpus, run_app

    # This command says itself when it is ready; Serve's own lines would say it twice.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    console = Console(highlight=False, soft_wrap=True)
    # Before Ray is started: a folder that cannot be served is refused in a second, not in twenty.
    check_app(*configs)
    for config in configs:
        workers = f"{config.prefill.replicas} prefill and {config.decode.replicas} decode workers"
        console.print(f"starting {workers} for {config.model}", markup=False)
    ray_here = local_ray(num_cpus(*configs) + 1)
    if join is not None:
        ray_here, keys = joined_ray(), Path(join).absolute()
        for config in configs:
            config.api_key_file = str(keys)
        overrides = [*overrides, f"api_key_file={keys}"]
    with ray_here, run_app(*configs) as running:
        console.print(f"KV pages travel by {running.transport}", markup=False)
        console.print(f"ready: {running.url}  model {running.model}  key file {running.api_key_file}", markup=False)
        console.print(f"Ctrl-C stops it; kill -HUP {os.getpid()} reads the config again", markup=False)
        try:
            for _ in _hangups():
                _update(console, running, paths, overrides)
        except KeyboardInterrupt:
            console.print("stopping", markup=False)


def _hangups() -> Iterator[None]:
    """One item for every SIGHUP."""
    wishes: queue.SimpleQueue[None] = queue.SimpleQueue()
    before = signal.signal(signal.SIGHUP, lambda *_: wishes.put(None))
    try:
        while True:
            yield wishes.get()
    finally:
        signal.signal(signal.SIGHUP, before)


def _update(console: Console, running: Running, paths: Sequence[str], overrides: list[str]) -> None:
    """Serve what the config says now; what is wrong with it is told, and the old one goes on."""
    from farspan.serve.app import update_app

    try:
        configs = _load(paths, overrides)
        update_app(running, *configs)
    except FarspanError as problem:
        console.print(f"not updated: {problem}", markup=False)
    else:
        console.print(f"updated: {', '.join(config.model for config in configs)}", markup=False)


def _load(paths: Sequence[str], overrides: list[str]) -> list[ServeConfig]:
    """The configs, with folders that workers find too, which run elsewhere. What is typed holds for all."""
    configs = []
    for path in paths:
        config = load_config(ServeConfig, path, overrides)
        config.model = absolute_uri(config.model)
        if config.engine.draft_model is not None:
            config.engine.draft_model = absolute_uri(config.engine.draft_model)
        config.engine.adapters = _placed(config.engine.adapters, Path(path).parent, overrides)
        configs.append(config)
    return configs


def _placed(adapters: dict[str, str], beside: Path, overrides: list[str]) -> dict[str, str]:
    """Folders of adapters: a file's are relative to the file, typed ones to here."""
    typed = written_keys(None, overrides)
    return {
        name: absolute_uri(folder if "://" in folder or f"engine.adapters.{name}" in typed else _join(beside, folder))
        for name, folder in adapters.items()
    }


def _join(beside: Path, folder: str) -> str:
    return str(beside / Path(folder).expanduser())
