"""What must be there before a cluster is started, looked at on this machine alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import botocore.session
from botocore.exceptions import BotoCoreError

from farspan.cluster.certs import check_certificates
from farspan.cluster.check_launcher import ec2_machines, no_machine
from farspan.cluster.environment import wheel
from farspan.cluster.examples import examples_of
from farspan.config.cluster import ClusterSpec
from farspan.config.cluster_rules import ROLES
from farspan.config.load import nearest
from farspan.errors import ConfigError, NotFoundError, StorageError

GCS_PORT = 6379
_LEAST_FREE_BYTES = 1 << 30
_GOOGLE_REGION = re.compile(r"[a-z]+-[a-z]+\d{1,2}")
_GOOGLE_KEY = "application_default_credentials.json"
# Addresses of the smallest subnet there is.
_LEAST_ADDRESSES = {"aws": 16, "gcp": 8}
# What a machine of Google's calls itself; its credentials come from the network.
_PRODUCT = Path("/sys/class/dmi/id/product_name")


def check_ready(spec: ClusterSpec, provider: str, root: Path, state: Path) -> None:
    """Refuse to start what could not come up: one ConfigError or StorageError for the first thing that is missing.

    `root` holds requirements.lock and dist/; `state` is where this machine keeps what it started.
    """
    for field, value in examples_of(spec, provider).items():
        raise ConfigError(field, "must be yours, and this is only an example", value, f"set {field} in the spec")
    if provider == "aws":
        _check_aws(spec)
    elif provider == "gcp":
        _check_google(spec)
    else:
        _check_free_port(spec.local.head)
    nodes = _addresses(spec) if provider == "local" else {}
    _check_commands()
    section = getattr(spec, provider)
    key = Path(section.ssh_private_key)
    _check_private(f"{provider}.ssh_private_key", key, "name the private key with its path")
    if key.expanduser().read_bytes().startswith(b"ssh-"):
        raise ConfigError(
            f"{provider}.ssh_private_key", "must be the private half", str(key), "name the file without .pub"
        )
    _check_private("Ray's token", Path("~/.ray/auth_token"), "run ray get-auth-token --generate")
    for file, way_out in (
        (root / "requirements.lock", "run it from the project's root"),
        (root / "dist" / wheel(spec.software), "run python -m pip wheel --no-deps --wheel-dir dist ."),
    ):
        if not file.is_file():
            raise NotFoundError(str(file), f"is sent to every node, and is not there; {way_out}")
    if spec.tls_folder is not None:
        check_certificates(Path(spec.tls_folder).expanduser(), nodes, _LEAST_ADDRESSES.get(provider, 0))
        _check_private("tls_folder", Path(spec.tls_folder) / "node.key", "run farspan infra certs again")
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
    _check_package("boto3", "boto3", spec.software.boto3)
    session = botocore.session.get_session()
    try:
        regions = session.get_available_regions("ec2")
        credentials = session.get_credentials()
    except BotoCoreError as problem:
        way_out = "correct AWS_PROFILE and ~/.aws, or run aws configure"
        raise ConfigError("AWS credentials", "must be whole", str(problem), way_out) from None
    if spec.aws.region not in regions:
        raise ConfigError("aws.region", "must be a region of EC2", spec.aws.region, nearest(spec.aws.region, regions))
    for role in ROLES:
        if (machine := getattr(spec, role).aws) not in ec2_machines():
            raise ConfigError(f"{role}.aws", "must be an instance type of EC2", machine, no_machine(machine))
    if credentials is None:
        raise ConfigError("AWS credentials", "must be there", None, "run aws configure, or aws sso login")


def _check_google(spec: ClusterSpec) -> None:
    if not _GOOGLE_REGION.fullmatch(spec.gcp.region):
        raise ConfigError(
            "gcp.region", "must be a region of Compute Engine", spec.gcp.region, "write it as us-central1"
        )
    _check_package("googleapiclient", "google-api-python-client", spec.software.google_api)
    # As Google's own libraries read them: empty is unset.
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or None
    folder = Path(os.environ.get("CLOUDSDK_CONFIG", Path("~/.config/gcloud").expanduser()))
    if named is not None and not Path(named).is_file():
        raise ConfigError("GOOGLE_APPLICATION_CREDENTIALS", "must name a file", named, "correct it, or unset it")
    if named is None and not (folder / _GOOGLE_KEY).is_file() and not _is_googles():
        way_out = "run gcloud auth application-default login"
        raise ConfigError("Google credentials", "must be there", None, way_out)


def _is_googles() -> bool:
    try:
        return _PRODUCT.read_text(encoding="utf-8").startswith("Google")
    except OSError:
        return False


def _check_package(module: str, package: str, version: str) -> None:
    if importlib.util.find_spec(module) is None:
        rule = "must be installed here: Ray's launcher asks the cloud by it"
        raise ConfigError(package, rule, None, f"run pip install {package}=={version}")


def _check_commands() -> None:
    for command, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
        if shutil.which(command) is None:
            rule = "must be installed here: Ray's launcher reaches nodes by it"
            raise ConfigError(command, rule, None, f"run apt-get install {package}")


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


def _addresses(spec: ClusterSpec) -> dict[str, str]:
    """The address of each machine of one's own, found as Ray's launcher finds it: IPv4 alone."""
    found = {}
    for field, hosts in (("head", [spec.local.head]), ("workers", spec.local.workers)):
        for host in hosts:
            try:
                found[host] = socket.gethostbyname(host)
            except (OSError, UnicodeError):
                rule = "must be IPv4 addresses, or names that this machine can look up"
                way_out = "correct it, add it to /etc/hosts, or write its address"
                raise ConfigError(f"local.{field}", rule, host, way_out) from None
    return found


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
