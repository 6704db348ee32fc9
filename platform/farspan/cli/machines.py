"""Ray on machines that stay when a cluster ends: `ray down` stops the head alone, here it is stopped on each."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from farspan.cli.launch import Launched, forget_nodes
from farspan.errors import ClusterError

_STOP_TIMEOUT_S = 60.0
_MOST_SESSIONS = 16
# As the launcher files stop Ray; a machine that was never set up has no profile, and nothing to stop.
_STOP = "test ! -r /etc/profile.d/farspan.sh || { . /etc/profile.d/farspan.sh; ray stop; }"


def stop_cluster(launched: Launched, config: dict[str, Any], timeout_s: float) -> int:
    """End Ray on every machine of a cluster and forget the cluster; gives how many they are. Raises ClusterError."""
    machines = machines_of(config["provider"])
    if failed := stop_ray(config, min(timeout_s, _STOP_TIMEOUT_S)):
        told = "; ".join(f"{machine} {problem}" for machine, problem in failed.items())
        gone = f", or delete {launched.file} where they are gone for good" if launched.file.is_file() else ""
        raise ClusterError(
            f"Ray may still run on {len(failed)} of {len(machines)} machines of {config['cluster_name']}: {told}; "
            f"run it again{gone}"
        )
    forget_nodes(config)
    launched.file.unlink(missing_ok=True)
    return len(machines)


def machines_of(provider: dict[str, Any]) -> list[str]:
    """Addresses in the provider section of a cluster of machines that stay, the head first."""
    return [provider["head_ip"], *provider["worker_ips"]]


def stop_ray(config: dict[str, Any], deadline_s: float) -> dict[str, str]:
    """End Ray on every machine of a local cluster over SSH; gives what went wrong on which machine.

    The head goes first: as long as it runs, it starts workers again. Each machine has until the deadline.
    """
    head, *workers = machines_of(config["provider"])
    found = {head: _stop_on(head, config["auth"], deadline_s)}
    with ThreadPoolExecutor(max_workers=_MOST_SESSIONS) as pool:
        answers = pool.map(lambda worker: _stop_on(worker, config["auth"], deadline_s), workers)
        found |= dict(zip(workers, answers, strict=True))
    return {machine: problem for machine, problem in found.items() if problem is not None}


def _stop_on(machine: str, auth: dict[str, Any], deadline_s: float) -> str | None:
    # As Ray's launcher connects: addresses are used again by machines with other keys.
    options = {
        "BatchMode": "yes", "ConnectTimeout": "10", "IdentitiesOnly": "yes", "LogLevel": "ERROR",
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": os.devnull,
    }  # fmt: skip
    key = os.path.expanduser(auth["ssh_private_key"])
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    command = ["ssh", *words, "-i", key, f"{auth['ssh_user']}@{machine}", _STOP]
    try:
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired:
        return f"did not answer within {deadline_s:g} s"
    except OSError as problem:
        return f"ssh could not be started: {problem.strerror}"
    if answer.returncode == 0:
        return None
    said = (answer.stdout + answer.stderr).decode(errors="replace").strip().splitlines()
    return said[-1].strip() if said else f"ended with {answer.returncode}"
