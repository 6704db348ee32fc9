"""`farspan jobs`: what runs on a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from farspan.telemetry.units import duration

app = typer.Typer(help="Jobs that were submitted to a Ray cluster.", no_args_is_help=True)

Cluster = Annotated[str, typer.Option(help="Dashboard address of the Ray cluster.", metavar="URL")]
JobId = Annotated[str, typer.Argument(help="Id that `farspan jobs list` shows.", metavar="JOB")]
_HERE = "http://127.0.0.1:8265"


@app.command("list")
def list_all(
    cluster: Cluster = _HERE, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Every submitted job, newest first."""
    from farspan.jobs.jobs import list_jobs

    jobs = list_jobs(cluster)
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in jobs], indent=1))
        return
    table = Table("job", "name", "status", "started (UTC)", "time", box=None)
    for job in jobs:
        table.add_row(job.id, job.name, job.status, job.started, duration(job.seconds))
    Console(highlight=False, soft_wrap=True).print(table if jobs else "no jobs were submitted to this cluster")


@app.command()
def logs(
    job: JobId,
    cluster: Cluster = _HERE,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
) -> None:
    """What a job printed; leaving with Ctrl-C does not stop it."""
    from farspan.jobs.jobs import show_log

    show_log(cluster, job, typer.echo, to_the_end=follow)


@app.command()
def stop(job: JobId, cluster: Cluster = _HERE) -> None:
    """Ask a job to publish a checkpoint and end; submitted again, it goes on from there."""
    from farspan.jobs.jobs import stop_job

    stopped = stop_job(cluster, job)
    typer.echo(f"{stopped.id} {stopped.status}")


@app.command()
def describe(job: JobId, cluster: Cluster = _HERE) -> None:
    """Everything the cluster knows about a job, as JSON."""
    from farspan.jobs.jobs import describe_job

    typer.echo(json.dumps(asdict(describe_job(cluster, job)), indent=1))
