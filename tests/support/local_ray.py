"""A local Ray of the tests' own: token authentication on, dashboard and job server on loopback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from farspan.jobs.launch import make_token, ray_environment


@dataclass(frozen=True)
class LocalRay:
    """Where it listens. This process is connected to it."""

    dashboard: str
    gcs_address: str


@contextmanager
def start_local_ray() -> Iterator[LocalRay]:
    """Start it with four logical CPUs; stop it, whatever happens."""
    make_token()
    with ray_environment():
        try:
            with own_python_first():
                context = ray.init("local", num_cpus=4, include_dashboard=True, log_to_driver=False)
            yield LocalRay(f"http://{context.dashboard_url}", context.address_info["gcs_address"])
        finally:
            ray.shutdown()


@contextmanager
def own_python_first() -> Iterator[None]:
    """Inside, `python` is this one for whatever is started, as in the image of a cluster."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
