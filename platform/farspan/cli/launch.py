"""`ray up` and `ray down` with an end: a time limit, a log, and what went wrong in one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from farspan.cluster.diagnose import cannot_write, diagnose
from farspan.errors import ClusterError, StorageError

_POLL_S = 0.2
_GRACE_S = 10.0
# What Ray's provider needs, by the name it is installed by.
_PACKAGES = {"aws": "boto3", "gcp": "google-api-python-client"}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster that runs, or is about to."""

    id: str
    node_type: str
    address: str | None
    status: str


@dataclass(frozen=True)
class Launched:
    """What this machine keeps of a cluster it started: `folder` is ours alone."""

    folder: Path

    @property
    def file(self) -> Path:
        """The launcher file it was started from."""
        return self.folder / "launcher.yaml"

    @property
    def log(self) -> Path:
        """What the launcher said last."""
        return self.folder / "launcher.log"

    def keep(self, text: str) -> None:
        """Write the launcher file; raises StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.file.write_text(text, encoding="utf-8")
        except OSError as problem:
            raise StorageError(str(self.file), cannot_write(problem)) from None

    def config(self) -> dict[str, Any]:
        """The launcher file, read. Raises StorageError where it is none."""
        try:
            config = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, OSError):
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
            reason = (
                "is not the launcher file that it should be; delete it, and the spec says where to look for machines"
            )
            raise StorageError(str(self.file), reason)
        return config


def run_launcher(launched: Launched, verb: str, timeout_s: float, say: Callable[[str], None]) -> None:
    """`ray up` or `ray down` on a launcher file.

    Raises ClusterError when it fails or takes longer than `timeout_s`; then every process it started is ended.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", verb, "--yes", str(launched.file)]
    if verb == "up":
        # Ray's cache remembers ids of an earlier cluster of that name.
        command.insert(-1, "--no-config-cache")
    ends = time.monotonic() + timeout_s
    with launched.log.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < ends:
                say(_last_line(launched.log))
                time.sleep(_POLL_S)
            late = process.poll() is None
        finally:
            _end(process)
    output = launched.log.read_text(encoding="utf-8", errors="replace")
    if late:
        raise ClusterError(f"ray {verb} did not end within {timeout_s:g} s: {diagnose(output)} (log: {launched.log})")
    if process.returncode != 0:
        raise ClusterError(f"ray {verb} failed: {diagnose(output)} (log: {launched.log})")


def nodes_of(config: dict[str, Any]) -> list[Node]:
    """The machines of a launcher file that are there, asked of its provider. Raises ClusterError."""
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

    found = []
    with _provider_of(config) as provider:
        for node in provider.non_terminated_nodes({}):
            tags = provider.node_tags(node)
            kind = tags.get(TAG_RAY_USER_NODE_TYPE) or tags.get(TAG_RAY_NODE_KIND, "")
            found.append(Node(node, kind, provider.internal_ip(node), tags.get(TAG_RAY_NODE_STATUS, "")))
    return found


def forget_nodes(config: dict[str, Any]) -> None:
    """Let Ray's record of machines that stay say that they are down. Raises ClusterError."""
    with _provider_of(config) as provider:
        provider.terminate_nodes(provider.non_terminated_nodes({}))


@contextlib.contextmanager
def _provider_of(config: dict[str, Any]) -> Iterator[Any]:
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler._private.util import prepare_config

    try:
        ask_cloud(config["provider"])
        # Ray tells its own story on standard output, where ours may be JSON, and in its log.
        with contextlib.redirect_stdout(io.StringIO()), _quiet("ray.autoscaler"):
            prepared = prepare_config(config)
            yield _get_node_provider(prepared["provider"], prepared["cluster_name"])
    except ImportError as problem:
        package = _PACKAGES.get(config["provider"]["type"], problem.name)
        raise ClusterError(f"this provider needs the package {package}; run pip install {package}") from None
    except ClusterError:
        raise
    except Exception as problem:
        raise ClusterError(
            f"the provider does not answer: {diagnose(f'{type(problem).__name__}: {problem}')}"
        ) from None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only warnings of a logger, for a while."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def ask_cloud(provider: dict[str, Any]) -> None:
    """One cheap question to EC2, as Ray asks for many minutes where nobody answers. Raises ClusterError."""
    if provider["type"] != "aws":
        return
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import get_session

    patience = Config(connect_timeout=10, read_timeout=20, retries={"total_max_attempts": 2})
    try:
        client = get_session().create_client("ec2", region_name=provider["region"], config=patience)
        client.describe_instances(MaxResults=5)
    except (BotoCoreError, ClientError, ValueError) as problem:
        raise ClusterError(f"EC2 does not answer: {diagnose(f'{type(problem).__name__}: {problem}')}") from None


def refuse_to_forget(launched: Launched, text: str) -> None:
    """Raise ClusterError where writing `text` over the record of a cluster would lose machines that run."""
    if not launched.file.is_file():
        return
    old, new = launched.config(), yaml.safe_load(text)["provider"]
    known = old["provider"]
    # Of machines that stay, nobody but the record knows whether Ray runs on them.
    if _would_forget(known, new) and (known["type"] == "local" or nodes_of(old)):
        changed = sorted(key for key in known.keys() | new.keys() if known.get(key) != new.get(key))
        raise ClusterError(
            f"{old['cluster_name']} runs with another {', '.join(changed)}, and its machines would be forgotten: "
            "run farspan cluster down first, or choose another name"
        )


def _would_forget(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether machines of one provider section could not be found any more by another."""
    if old["type"] != "local":
        return old != new
    # A worker more forgets nobody.
    return old["head_ip"] != new["head_ip"] or not set(old["worker_ips"]) <= set(new["worker_ips"])


def _last_line(log: Path) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and the SSH sessions it holds."""
    for way, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, way)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
