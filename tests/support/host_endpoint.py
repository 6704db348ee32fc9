"""An endpoint on the cluster of the host this runs in: `python -m tests.support.host_endpoint CONFIG`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from ray._private.state import actors

from farspan.config.load import load_config
from farspan.config.schema import ServeConfig
from farspan.jobs.launch import joined_ray
from farspan.serve.app import run_app


def places() -> dict[str, list[str]]:
    """Addresses of the nodes on which replicas of each deployment live."""
    found: dict[str, list[str]] = {}
    for actor in actors().values():
        # SERVE_REPLICA::farspan#decode#id
        if actor["State"] == "ALIVE" and actor["Name"].startswith("SERVE_REPLICA"):
            found.setdefault(actor["Name"].split("#")[1], []).append(actor["Address"]["IPAddress"])
    return found


def main(config: str) -> None:
    """Say where its replicas are once it answers; then wait to be killed."""
    with joined_ray(), run_app(load_config(ServeConfig, Path(config), [])):
        print("answers", *(f"{name}={','.join(sorted(where))}" for name, where in sorted(places().items())), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
