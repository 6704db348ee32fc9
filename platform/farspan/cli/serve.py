"""`farspan serve`."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import typer
from rich.console import Console

from farspan.config.check import check_serve
from farspan.config.load import dump_config, load_config
from farspan.config.schema import ServeConfig
from farspan.storage.paths import absolute_uri


def run_serve(
    path: str, overrides: list[str], *, dry_run: bool, cluster: str | None = None, join: str | None = None
) -> None:
    """Serve a config until Ctrl-C, here or, with `join` (a key file), on the Ray this process belongs to;
    or hand it to a cluster."""
    config = load_config(ServeConfig, path, overrides)
    check_serve(config)
    config.model = absolute_uri(config.model)
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        return
    if cluster is not None:
        from farspan.cli.serve_cluster import deploy

        deploy(config, cluster)
        return
    from farspan.jobs.launch import joined_ray, local_ray
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
    ray_here = local_ray(num_cpus(config) + 1)
    if join is not None:
        ray_here, keys = joined_ray(), Path(join).absolute()
        # On its way to the cluster the file lost its mode.
        keys.chmod(0o600)
        config.api_key_file = str(keys)
    with ray_here, run_app(config) as running:
        console.print(f"ready: {running.url}  model {running.model}  key file {running.api_key_file}", markup=False)
        console.print("Ctrl-C stops it", markup=False)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("stopping", markup=False)
