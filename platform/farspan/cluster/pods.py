"""Pods of Ray nodes: what every one of them may do, and what it may not."""

from __future__ import annotations

from typing import Any

from farspan.cluster.environment import HABITS, WATCHES
from farspan.config.cluster import ClusterSpec, NodesConfig

Manifest = dict[str, Any]

USER = 1000
ACCOUNT = "farspan"
SERVE_PORT = 8000
# What the kubelet and the daemons of a node keep for themselves.
_SHARE_OF_CPUS = 0.9
_HEAD_CPUS = 4
_SHARED_MEMORY_SHARE = 0.3
_GRACE_S = 120
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_PORTS = {"gcs": 6379, "client": 10001, "dashboard": 8265, "serve": SERVE_PORT, "metrics": 8080}


def resources(cpus: int, memory_gib: int, gpus: int = 0) -> Manifest:
    """Limits equal to requests: memory that a node has promised is there."""
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {"requests": amounts, "limits": dict(amounts)}


def workers_per_pod(nodes: NodesConfig) -> int:
    """How many workers of an endpoint a pod has room for: one for each GPU, or one."""
    return nodes.gpus or 1


def cpus_of_pod(nodes: NodesConfig) -> int:
    return max(1, int(nodes.cpus * _SHARE_OF_CPUS))


def head_group(spec: ClusterSpec, cluster: str, image: str, extra: list[Manifest]) -> Manifest:
    """The head of the resource named `cluster`. It offers no CPU to tasks; its Ray opens the dashboard to the cluster
    because the token guards it.
    """
    container = _container(spec, "ray-head", image, resources(_HEAD_CPUS, spec.head.memory_gib), extra)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    # The autoscaler beside Ray asks the API server for pods: the only pod that gets an account's token.
    pod = _pod(container, spec.head, extra, account=True)
    return {
        "rayStartParams": {"dashboard-host": "0.0.0.0"},
        "resources": {"CPU": "0"},
        "labels": {"farspan-role": "head"},
        "template": {"metadata": {"labels": {"farspan-role": "head", "farspan-cluster": cluster}}, "spec": pod},
    }


def worker_group(spec: ClusterSpec, role: str, image: str, extra: list[Manifest], *, pinned: bool = True) -> Manifest:
    """One kind of worker, which scales apart from the others. `pinned`: only on nodes that carry the role's label."""
    nodes: NodesConfig = getattr(spec, role)
    amounts = resources(cpus_of_pod(nodes), nodes.memory_gib, nodes.gpus)
    container = _container(spec, "ray-worker", image, amounts, extra)
    container["ports"] = [{"name": "metrics", "containerPort": _PORTS["metrics"]}]
    container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}}
    pod = _pod(container, nodes, extra, account=False)
    if pinned:
        pod["nodeSelector"] = {"farspan-role": role}
    if nodes.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": role,
        "replicas": nodes.min_nodes,
        "minReplicas": nodes.min_nodes,
        "maxReplicas": nodes.max_nodes,
        "idleTimeoutSeconds": nodes.idle_minutes * 60,
        "rayStartParams": {},
        "resources": {f"farspan-{role}": str(workers_per_pod(nodes))},
        "labels": {"farspan-role": role},
        "template": {"metadata": {"labels": {"farspan-role": role}}, "spec": pod},
    }


def submitter(spec: ClusterSpec, image: str) -> Manifest:
    """The pod that hands the job in and follows its log."""
    container = _container(spec, "ray-job-submitter", image, resources(1, 2), [])
    pod = _pod(container, spec.head, [], account=False)
    return {"metadata": {"labels": {"farspan-role": "submitter"}}, "spec": pod | {"restartPolicy": "Never"}}


def _container(spec: ClusterSpec, name: str, image: str, amounts: Manifest, extra: list[Manifest]) -> Manifest:
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": "/home/farspan"},
        {"name": "shm", "mountPath": "/dev/shm"},
        *(
            {"name": volume["name"], "mountPath": f"/etc/farspan/{volume['name']}", "readOnly": True}
            for volume in extra
        ),
    ]
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": key, "value": value} for key, value in {**WATCHES, **HABITS}.items()],
        "resources": amounts,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }


def _pod(container: Manifest, nodes: NodesConfig, extra: list[Manifest], *, account: bool) -> Manifest:
    shared_gib = max(1, int(nodes.memory_gib * _SHARED_MEMORY_SHARE))
    return {
        # With the second autoscaler a pod that ended is replaced, never restarted.
        "restartPolicy": "Never",
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": account,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": f"{nodes.disk_gib // 4}Gi"}},
            # Models that come from S3 are kept under the home folder.
            {"name": "home", "emptyDir": {"sizeLimit": f"{nodes.disk_gib // 2}Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
            *extra,
        ],
    }
