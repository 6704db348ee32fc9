"""One rank of a training without Ray: `python -m tests.support.host_rank JOB RANK`, in a host.

JOB is a file of JSON: `config` (YAML), `addresses` (of each rank's host), `steps`, and `results`, where rank 0 writes
what it was told: [step, loss, samples] of each step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tests.support.hosted_run import curve_here

from farspan.config.load import parse_config
from farspan.config.schema import RunConfig
from farspan.jobs.interface import talk_over

_PATIENCE = timedelta(seconds=60)


def main(job: str, rank: str) -> None:
    """Train to the last step."""
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    addresses = given["addresses"]
    talk_over(addresses[int(rank)])
    meet = f"tcp://{addresses[0]}:29500"
    dist.init_process_group("gloo", meet, _PATIENCE, world_size=len(addresses), rank=int(rank))
    with tempfile.TemporaryDirectory() as cache:
        found = curve_here(parse_config(RunConfig, given["config"]), cache, given["steps"])
    if rank == "0":
        rows = [[step, loss, samples] for step, (loss, samples) in found.items()]
        Path(given["results"]).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
