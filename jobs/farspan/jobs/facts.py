"""What a running cluster says of its nodes, through the same dashboard that jobs are submitted to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from farspan.cluster.nodes import Cluster, Node
from farspan.jobs.launch import ray_environment

_ASK_S = 20
_MOST_NODES = 10_000
_MIB = 2**20
# Where nobody told Ray what a GPU is called, its driver did; Ray counts one such resource on the node.
_KIND = "accelerator_type:"


def ask_cluster(address: str) -> Cluster | None:
    """The living nodes of the cluster whose dashboard listens at `address`; none where it does not say."""
    with ray_environment():
        try:
            found = list_nodes(
                address, limit=_MOST_NODES, timeout=_ASK_S, filters=[("state", "=", "ALIVE")], detail=True
            )
            client = JobSubmissionClient(address)
            machines = _machines(_asked(client, "/nodes?view=summary"))
            grows = grows_by_itself(_asked(client, "/api/cluster_status"))
        except Exception:
            # Ray reports every failure here as some RuntimeError, ConnectionError or requests error; what is submitted
            # next tells the reason.
            return None
    nodes = tuple(
        node_of(str(node.node_ip), node.resources_total or {}, machines.get(str(node.node_id), {})) for node in found
    )
    return Cluster(nodes, grows) if nodes else None


def node_of(address: str, resources: Mapping[str, float], machine: Mapping[str, Any]) -> Node:
    """A node of what Ray counts on it, and of what the agent on it has seen; before its first look that is nothing."""
    memory = machine.get("mem") or [None]
    gpus = [gpu for gpu in machine.get("gpus") or [] if gpu.get("name") and gpu.get("memoryTotal")]
    least = min(gpus, key=lambda gpu: float(gpu["memoryTotal"]), default=None)
    kind = next((name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)), None)
    return Node(
        address=address,
        resources=dict(resources),
        memory_bytes=None if memory[0] is None else float(memory[0]),
        gpu=kind if least is None else str(least["name"]),
        gpu_bytes=None if least is None else float(least["memoryTotal"]) * _MIB,
    )


def grows_by_itself(status: Mapping[str, Any]) -> bool | None:
    """Whether an autoscaler may add nodes; none: it does not say.

    Where there is nothing to scale, Ray's monitor names every node after itself.
    """
    report = (status.get("clusterStatus") or {}).get("autoscalerReport") or {}
    kinds: Mapping[str, str] = report.get("nodeTypeMapping") or {}
    if not kinds:
        return None
    return any(kind != f"node_{node}" for node, kind in kinds.items())


def _asked(client: JobSubmissionClient, path: str) -> dict[str, Any]:
    # The client has no verb for it, but the token, and how to send it.
    answer = client._do_request("GET", path, timeout=_ASK_S)
    answer.raise_for_status()
    return dict(answer.json()["data"])


def _machines(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the agent of each node has seen, by the node's id."""
    seen = summary.get("summary") or []
    return {
        str(machine["raylet"]["nodeId"]): machine for machine in seen if (machine.get("raylet") or {}).get("nodeId")
    }
