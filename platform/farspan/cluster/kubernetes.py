"""The kustomize tree: base, components, overlays, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from farspan.cluster import surroundings
from farspan.cluster.pods import Manifest
from farspan.cluster.rayclusters import cluster, service, training, training_config
from farspan.config.cluster import ClusterSpec

COMPONENTS = ("gcs-ft-redis", "gcs-ft-rocksdb", "mtls", "kueue", "monitor", "spot", "rdma")
OVERLAYS = {
    "dev-cpu": (("common", "cluster"), ()),
    "gpu": (("common", "train", "serve"), ("monitor",)),
    "prod": (("common", "train", "serve"), ("gcs-ft-redis", "mtls", "kueue", "monitor")),
}
# Where a cluster's spec lies in each kind, and which worker groups the rendered one has.
_KINDS = {
    "RayCluster": ("/spec", ("cpu",)),
    "RayJob": ("/spec/rayClusterSpec", ("train",)),
    "RayService": ("/spec/rayClusterConfig", ("prefill", "decode")),
}
_HEADER = "# Rendered from infra/cluster.yaml by `farspan infra render`: change it there.\n"
_ABOUT = {
    "base/common": "Around every cluster: a namespace with a closed network, and an account.",
    "base/cluster": "A cluster of CPU workers to work on.",
    "base/train": "A training job with a cluster of its own.",
    "base/serve": "The endpoint: prefill and decode workers in groups of their own.",
    "components/gcs-ft-redis": "The head's state in Redis: a new head goes on where the last one ended.",
    "components/gcs-ft-rocksdb": "The head's state on a volume, without Redis (alpha in KubeRay 1.7, behind a gate).",
    "components/mtls": "TLS both ways between Ray's processes (alpha in KubeRay 1.7; needs cert-manager).",
    "components/kueue": "Training waits in a queue until all its pods fit; its size is then fixed.",
    "components/monitor": "Prometheus reads every Ray pod (needs the Prometheus operator).",
    "components/spot": "Training and prefill on nodes the cloud may take back; Ray hears no notice (infra/README.md).",
    "components/rdma": "EFA adapters and huge pages for training and serving; nodes must let memory be locked.",
}


def render_kubernetes(spec: ClusterSpec) -> dict[str, str]:
    """Path under infra/k8s to text."""
    folders = {**_base(spec), **_components(spec), **_overlays(spec)}
    return {
        f"{folder}/{name}.yaml": _text(documents, _ABOUT.get(folder) if name == "kustomization" else None)
        for folder, files in folders.items()
        for name, documents in files.items()
    }


def _base(spec: ClusterSpec) -> dict[str, dict[str, list[Manifest]]]:
    development, job, endpoint = cluster(spec), training(spec), service(spec)
    common = {
        "namespace": [surroundings.namespace(spec)],
        "account": [surroundings.account()],
        "network": surroundings.network_policies(),
    }
    parts = {
        "common": common,
        "cluster": {"raycluster": [development], "disruption": [surroundings.head_budget(development)]},
        "train": {"rayjob": [job], "config": [training_config(spec)], "disruption": [surroundings.head_budget(job)]},
        "serve": {
            "rayservice": [endpoint],
            "disruption": [surroundings.head_budget(endpoint), *surroundings.worker_budgets(spec)],
        },
    }
    return {f"base/{name}": _with_kustomization(spec, files) for name, files in parts.items()}


def _with_kustomization(spec: ClusterSpec, files: dict[str, list[Manifest]]) -> dict[str, list[Manifest]]:
    kustomization = _kustomization("Kustomization", resources=[f"{name}.yaml" for name in files])
    return {"kustomization": [kustomization | {"namespace": spec.kubernetes.namespace}], **files}


def _overlays(spec: ClusterSpec) -> dict[str, dict[str, list[Manifest]]]:
    found = {}
    for name, (parts, components) in OVERLAYS.items():
        kustomization = _kustomization("Kustomization", resources=[f"../../base/{part}" for part in parts])
        kustomization["namespace"] = spec.kubernetes.namespace
        if components:
            kustomization["components"] = [f"../../components/{component}" for component in components]
        found[f"overlays/{name}"] = {"kustomization": [kustomization]}
    return found


def _components(spec: ClusterSpec) -> dict[str, dict[str, list[Manifest]]]:
    redis = {
        "backend": "redis",
        "redisAddress": spec.kubernetes.redis_address,
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": spec.kubernetes.redis_secret, "key": "password"}}},
    }
    rocksdb = {
        "backend": "rocksdb",
        "storage": {
            "size": "10Gi",
            "storageClassName": spec.kubernetes.storage_class,
            "accessModes": ["ReadWriteOnce"],
            "deletionPolicy": "DeleteWithCluster",
        },
    }
    return {
        "components/gcs-ft-redis": {
            "kustomization": [_component(_kept(redis, spec), resources=["network.yaml"])],
            "network": [surroundings.redis_policy(spec)],
        },
        "components/gcs-ft-rocksdb": {"kustomization": [_component(_kept(rocksdb, spec))]},
        "components/mtls": {"kustomization": [_component(_add("/tlsOptions", {"enabled": True}, tuple(_KINDS)))]},
        "components/kueue": {
            "kustomization": [_component(_queued(spec), resources=["queues.yaml"])],
            "queues": surroundings.queues(spec),
        },
        "components/monitor": {
            "kustomization": [_component([], resources=["monitor.yaml"])],
            "monitor": [surroundings.pod_monitor()],
        },
        "components/spot": {"kustomization": [_component(_spot())]},
        "components/rdma": {"kustomization": [_component(_rdma())]},
    }


def _add(path: str, value: Any, kinds: Iterable[str]) -> list[Manifest]:
    """One patch for each kind that adds `value` to its cluster's spec."""
    return [_patch(kind, [_operation(f"{_KINDS[kind][0]}{path}", value)]) for kind in kinds]


def _kept(storage: Manifest, spec: ClusterSpec) -> list[Manifest]:
    """What lives on keeps its head's state, and then its head may go. A job starts again from its checkpoint."""
    lasting = ("RayCluster", "RayService")
    budgets = [surroundings.head_budget(resource) for resource in (cluster(spec), service(spec))]
    return [*_add("/gcsFaultToleranceOptions", storage, lasting), *map(_deletion, budgets)]


def _queued(spec: ClusterSpec) -> list[Manifest]:
    label = {"kueue.x-k8s.io/queue-name": spec.kubernetes.queue}
    # Kueue admits a job as a whole; a cluster that grows later would pass its quota by.
    fixed = {"op": "replace", "path": "/spec/rayClusterSpec/enableInTreeAutoscaling", "value": False}
    options = {"op": "remove", "path": "/spec/rayClusterSpec/autoscalerOptions"}
    token = "/spec/rayClusterSpec/headGroupSpec/template/spec/automountServiceAccountToken"
    silent = {"op": "replace", "path": token, "value": False}
    return [_patch("RayJob", [_operation("/metadata/labels", label), fixed, options, silent])]


def _spot() -> list[Manifest]:
    selector = "/template/spec/nodeSelector/eks.amazonaws.com~1capacityType"
    return [
        _patch("RayJob", [_operation(f"{_group('RayJob', 'train')}{selector}", "SPOT")]),
        _patch("RayService", [_operation(f"{_group('RayService', 'prefill')}{selector}", "SPOT")]),
    ]


def _rdma() -> list[Manifest]:
    patches = []
    for kind, role in (("RayJob", "train"), ("RayService", "prefill"), ("RayService", "decode")):
        container = f"{_group(kind, role)}/template/spec/containers/0"
        operations = [
            _operation(f"{container}/resources/{side}/{name}", amount)
            for side in ("requests", "limits")
            for name, amount in (("vpc.amazonaws.com~1efa", "1"), ("hugepages-2Mi", "5120Mi"))
        ]
        patches.append(_patch(kind, operations))
    return patches


def _group(kind: str, role: str) -> str:
    path, roles = _KINDS[kind]
    return f"{path}/workerGroupSpecs/{roles.index(role)}"


def _operation(path: str, value: Any) -> Manifest:
    return {"op": "add", "path": path, "value": value}


def _patch(kind: str, operations: list[Manifest]) -> Manifest:
    return {"target": {"kind": kind}, "patch": yaml.safe_dump(operations, sort_keys=False)}


def _deletion(manifest: Manifest) -> Manifest:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    patch = {"$patch": "delete", "apiVersion": manifest["apiVersion"], "kind": kind, "metadata": {"name": name}}
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(patch, sort_keys=False)}


def _component(patches: list[Manifest], resources: list[str] | None = None) -> Manifest:
    found = _kustomization("Component", resources=resources or []) | {"patches": patches}
    return {key: value for key, value in found.items() if value}


def _kustomization(kind: str, resources: list[str]) -> Manifest:
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    return {"apiVersion": f"kustomize.config.k8s.io/{version}", "kind": kind, "resources": resources}


class _Readable(yaml.SafeDumper):
    """No anchors; text of several lines as it is."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _represent_text)


def _text(documents: list[Manifest], about: str | None) -> str:
    head = _HEADER + (f"# {about}\n" if about else "")
    return head + "---\n".join(yaml.dump(d, Dumper=_Readable, sort_keys=False, width=120) for d in documents)
