"""What must be there before a cluster is started, looked at on this machine alone."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
from pathlib import Path

import botocore.session

from farspan.cluster.environment import wheel
from farspan.config.cluster import ClusterSpec
from farspan.config.load import nearest
from farspan.errors import ConfigError, NotFoundError, StorageError

GCS_PORT = 6379
_LEAST_FREE_BYTES = 1 << 30
_ZEROS = re.compile(r"(?<![1-9a-f])0{12,17}\b")


def check_ready(spec: ClusterSpec, provider: str, root: Path, state: Path) -> None:
    """Refuse to start what could not come up: one ConfigError or StorageError for the first thing that is missing.

    `root` holds requirements.lock and dist/; `state` is where this machine keeps what it started.
    """
    if provider == "aws":
        _check_aws(spec)
    elif provider == "gcp" and spec.gcp.project == "your-project":
        raise ConfigError("gcp.project", "must be your project", spec.gcp.project, "set gcp.project=ID")
    elif provider == "local":
        _check_free_port(spec.local.head)
    section = getattr(spec, provider)
    _check_private(f"{provider}.ssh_private_key", Path(section.ssh_private_key), "name the private key with its path")
    _check_private("Ray's token", Path("~/.ray/auth_token"), "run ray get-auth-token --generate")
    for file, way_out in (
        (root / "requirements.lock", "run it from the project's root"),
        (root / "dist" / wheel(spec.software), "run python -m pip wheel --no-deps --wheel-dir dist ."),
    ):
        if not file.is_file():
            raise NotFoundError(str(file), f"is sent to every node, and is not there; {way_out}")
    check_space(state)


def check_space(folder: Path) -> None:
    """Refuse to start with a disk that could not hold what is written about the cluster."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE_BYTES:
        raise StorageError(
            str(there), f"only {free >> 20} MiB are free of the {_LEAST_FREE_BYTES >> 20} needed; free space"
        )


def _check_aws(spec: ClusterSpec) -> None:
    regions = botocore.session.get_session().get_available_regions("ec2")
    if spec.aws.region not in regions:
        raise ConfigError("aws.region", "must be a region of EC2", spec.aws.region, nearest(spec.aws.region, regions))
    for field in ("account", "image", "subnet", "security_group"):
        value = getattr(spec.aws, field)
        if _ZEROS.search(value):
            raise ConfigError(f"aws.{field}", "must be yours, not zeros", value, f"set aws.{field} in the spec")
    if botocore.session.get_session().get_credentials() is None:
        raise ConfigError("AWS credentials", "must be there", None, "run aws configure, or aws sso login")


def _check_private(field: str, path: Path, way_out: str) -> None:
    file = path.expanduser()
    if not file.is_file():
        raise ConfigError(field, "must be a file of this machine", str(path), way_out)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            field, f"must be readable by you alone, mode 600: {path}", f"{mode:o}", f"run chmod 600 {path}"
        )
    if file.stat().st_size == 0:
        raise ConfigError(field, f"must not be empty: {path}", "0 bytes", way_out)
    if not os.access(file, os.R_OK):
        raise ConfigError(field, f"must be readable: {path}", f"{mode:o}", f"run chmod 600 {path}")


def _check_free_port(head: str) -> None:
    """Where the head is this machine itself, Ray's port must be free."""
    with socket.socket() as here:
        try:
            here.bind((head, 0))
        except OSError:
            return
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((head, GCS_PORT))
        except OSError:
            raise ConfigError(
                "local.head", f"must have port {GCS_PORT} free", head, "stop the Ray that runs there: ray stop"
            ) from None
