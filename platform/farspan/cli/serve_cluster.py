"""`farspan serve --cluster`: the endpoint as a job of a running cluster.

Keys stay on this machine: their hashes travel, as replicas know them.
"""

from __future__ import annotations

from dataclasses import replace

import typer

from farspan.config.load import dump_config
from farspan.config.schema import ServeConfig
from farspan.errors import ConfigError

_READY = "ready: "
_EVERYWHERE = ("0.0.0.0", "::")


def deploy(config: ServeConfig, address: str) -> None:
    """Submit the endpoint, follow it until it answers, and leave it running."""
    from farspan.jobs.submit import head_of, is_this_machine, submit_command, wait_for_line
    from farspan.serve.app import check_app, model_name
    from farspan.serve.keys import hashed_lines, read_keys

    here = is_this_machine(address)
    if here:
        check_app(config)
    elif "://" not in config.model:
        raise ConfigError("model", "must be reachable from the cluster", config.model, "use s3://BUCKET/PATH")
    keys, key_file = read_keys(config)
    files = {"config.yaml": dump_config(replace(config, api_key_file=None)), "keys": hashed_lines(keys)}
    job = submit_command(address, "serve config.yaml --join keys", files, f"serve-{model_name(config)}")
    typer.echo(f"submitted {job.job_id} to {address}; farspan jobs stop {job.job_id} --cluster {address} ends it")
    said = wait_for_line(job, _READY, typer.echo).partition("  key file ")[0]
    head = None if here or config.host not in _EVERYWHERE else head_of(address)
    typer.echo(f"{said if head is None else said.replace('127.0.0.1', head, 1)}  key file {key_file}")
    if not here and head is None:
        typer.echo(f"it listens on {config.host} of the head: forward port {config.port} to reach it")
