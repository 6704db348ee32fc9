"""`farspan serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console

from farspan.config.check import check_serve
from farspan.config.load import dump_config, load_config
from farspan.config.schema import ServeConfig
from farspan.storage.paths import absolute_uri

if TYPE_CHECKING:
    from farspan.serve.app import Running


def run_serve(path: str, overrides: list[str], *, dry_run: bool) -> None:
    """Serve a config until Ctrl-C."""
    config = load_config(ServeConfig, path, overrides)
    check_serve(config)
    config.model = absolute_uri(config.model)
    if dry_run:
        typer.echo(dump_config(config), nl=False)
        return
    from farspan.serve.app import serve_forever

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"starting {config.prefill.replicas} prefill and {config.decode.replicas} decode workers for {config.model}",
        markup=False,
    )

    def on_ready(running: Running) -> None:
        console.print(f"ready: {running.url}  model {running.model}  key file {running.api_key_file}", markup=False)
        console.print("Ctrl-C stops it", markup=False)

    serve_forever(config, None, on_ready)
    console.print("stopped", markup=False)
