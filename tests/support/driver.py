"""A driver of a training run that belongs to one chosen node: `python -m tests.support.driver RUN GCS NODE_ADDRESS`."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from farspan.cli.record import run_log
from farspan.config.load import load_config
from farspan.config.schema import RunConfig
from farspan.jobs.launch import ray_environment
from farspan.jobs.train import run_training
from farspan.telemetry.events import EventBody, StepReport


def main(run: str, gcs_address: str, node_address: str) -> None:
    """Say the number of each step as soon as it is in the log."""
    config = load_config(RunConfig, Path(run), [])
    with ray_environment():
        ray.init(gcs_address, _node_ip_address=node_address, log_to_driver=False)
        with run_log(config.output) as log:

            def tell(body: EventBody) -> None:
                log.append(body)
                if isinstance(body, StepReport):
                    print(f"step {body.step}", flush=True)

            run_training(config, [], tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
