"""`farspan serve --cluster`: the endpoint as a job of a running cluster.

Keys stay on this machine: their hashes travel, as replicas know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import typer

from farspan.config.load import dump_config
from farspan.config.schema import ServeConfig
from farspan.errors import ConfigError

_READY = "ready: "
_EVERYWHERE = ("0.0.0.0", "::")


def deploy(configs: Sequence[ServeConfig], address: str) -> None:
    """Submit the endpoint, follow it until it answers, and leave it running."""
    from farspan.jobs.submit import head_of, is_this_machine, submit_command, wait_for_line
    from farspan.serve.app import check_app
    from farspan.serve.keys import hashed_lines, read_keys
    from farspan.serve.lineup import line_up

    here, config = is_this_machine(address), configs[0]
    names = [place.name for place in line_up(configs)]
    if here:
        check_app(*configs)
    else:
        _refuse_near(configs)
    keys, key_file = read_keys(config)
    files = {f"config-{n}.yaml": dump_config(replace(each, api_key_file=None)) for n, each in enumerate(configs)}
    command = f"serve {' '.join(files)} --join keys"
    job = submit_command(address, command, {**files, "keys": hashed_lines(keys)}, f"serve-{'-'.join(names)}")
    typer.echo(f"submitted {job.job_id} to {address}; farspan jobs stop {job.job_id} --cluster {address} ends it")
    said = wait_for_line(job, _READY, typer.echo).partition("  key file ")[0]
    head = None if here or config.host not in _EVERYWHERE else head_of(address)
    typer.echo(f"{said if head is None else said.replace('127.0.0.1', head, 1)}  key file {key_file}")
    if not here and head is None:
        typer.echo(f"it listens on {config.host} of the head: forward port {config.port} to reach it")


def _refuse_near(configs: Sequence[ServeConfig]) -> None:
    for config in configs:
        for field, uri in (("model", config.model), ("engine.draft_model", config.engine.draft_model)):
            if uri is not None and "://" not in uri:
                raise ConfigError(field, "must be reachable from the cluster", uri, "use s3://BUCKET/PATH")
