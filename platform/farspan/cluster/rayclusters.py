"""The three custom resources of KubeRay 1.7: a cluster to work on, a training job, a service."""

from __future__ import annotations

from typing import Any

import yaml

from farspan.cluster.pods import (
    CONTAINER_SECURITY,
    SERVE_PORT,
    Manifest,
    cpus_of_pod,
    head_group,
    resources,
    submitter,
    worker_group,
    workers_per_pod,
)
from farspan.config.cluster import ClusterSpec, NodesConfig
from farspan.config.load import config_of
from farspan.config.schema import ServeConfig

API = "ray.io/v1"
KEYS_FILE = "/etc/farspan/api-keys/api_keys"
_ENTRYPOINT = "python -m farspan.cli.main train {config} --join"
_CLEAN_UP_S = 600
# As `farspan serve` sets it: longer than the idle time of a load balancer, which is 60 s on AWS.
_KEEP_ALIVE_S = 75
_JOB_START_S = 3600
# What `farspan serve` declares too: one policy for all deployments, which sizes both roles by what clients see.
_SIZING = "farspan.serve.sizing:Sizing"
_WORKER_CPUS = 4


def cluster(spec: ClusterSpec) -> Manifest:
    """CPU workers without a label to look for: it starts on any cluster, also a small one."""
    image = spec.kubernetes.cpu_image
    groups = [worker_group(spec, "cpu", image, [], pinned=False)]
    return _resource("RayCluster", spec.name, _cluster_spec(spec, head_group(spec, spec.name, image, []), groups))


def training(spec: ClusterSpec) -> Manifest:
    """One cluster per job: it ends with the job, and nobody else's code runs in it."""
    name, image = f"{spec.name}-train", spec.kubernetes.image
    volume = {"name": "train", "configMap": {"name": "farspan-train"}}
    head, group = head_group(spec, name, image, [volume]), worker_group(spec, "train", image, [volume])
    # The whole job or nothing: the driver waits for the group, so that it starts at its full size.
    group |= {"replicas": spec.train.max_nodes, "minReplicas": spec.train.max_nodes}
    body = {
        "entrypoint": _ENTRYPOINT.format(config=spec.kubernetes.train_config),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _CLEAN_UP_S,
        "preRunningDeadlineSeconds": _JOB_START_S,
        # Resumable: a second attempt goes on from the newest checkpoint.
        "backoffLimit": 2,
        "submitterPodTemplate": submitter(spec, image),
        "rayClusterSpec": _cluster_spec(spec, head, [group]),
    }
    return _resource("RayJob", name, body)


def service(spec: ClusterSpec) -> Manifest:
    """Prefill and decode workers in groups of their own, which scale apart."""
    name, image = f"{spec.name}-serve", spec.kubernetes.image
    volume = {"name": "api-keys", "secret": {"secretName": spec.kubernetes.api_key_secret, "defaultMode": 0o440}}
    groups = [worker_group(spec, role, image, [volume]) for role in ("prefill", "decode")]
    body = {
        "serveConfigV2": yaml.safe_dump(serve_config(spec), sort_keys=False),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": 60,
        "excludeHeadPodFromServeSvc": False,
        "rayClusterConfig": _cluster_spec(spec, head_group(spec, name, image, [volume]), groups),
    }
    return _resource("RayService", name, body)


def serve_config(spec: ClusterSpec) -> Manifest:
    """Serve's own config: the application, which may change the number of workers of each role within its group."""
    arguments: dict[str, Any] = {
        "model": spec.kubernetes.model,
        "host": "0.0.0.0",
        "port": SERVE_PORT,
        "api_key_file": KEYS_FILE,
        **{role: _role(role, getattr(spec, role)) for role in ("prefill", "decode")},
        "engine": {"dtype": "bfloat16", "kv_bytes": 40 * 2**30},
    }
    config = config_of(ServeConfig, arguments)
    application = {
        "name": "farspan",
        "route_prefix": "/",
        "import_path": "farspan.cli.service:build",
        "args": arguments,
        **_sizing(config),
    }
    return {
        # KubeRay asks every worker pod of a service for its proxy's health: without one no worker ever gets ready.
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",
            "port": SERVE_PORT,
            "request_timeout_s": config.proxy_timeout_s,
            "keep_alive_timeout_s": _KEEP_ALIVE_S,
        },
        "applications": [application],
    }


def training_config(spec: ClusterSpec) -> Manifest:
    """The run config the job reads; yours replaces it."""
    run = {
        "name": f"{spec.name}-train",
        "output": f"{spec.kubernetes.runs.rstrip('/')}/{spec.name}-train",
        "model": {"source": spec.kubernetes.model},
        "data": {"corpus": spec.kubernetes.corpus, "sequence_tokens": 131072},
        "parallel": {
            "workers": spec.train.gpus * spec.train.max_nodes,
            "sp": max(1, spec.train.gpus),
            "strategy": "auto",
        },
        "train": {"checkpoint_every": 50, "checkpoint_async": True},
        "resources": {"gpus_per_worker": 1.0, "cpus_per_worker": 8.0},
    }
    text = yaml.safe_dump(run, sort_keys=False)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "farspan-train"},
        "data": {"run.yaml": text},
    }


def _role(role: str, nodes: NodesConfig) -> dict[str, Any]:
    """From the least pods of the group to its most; at first there is a worker to answer."""
    room = workers_per_pod(nodes)
    least = nodes.min_nodes * room
    return {
        "replicas": max(1, least),
        "min_replicas": least,
        "max_replicas": nodes.max_nodes * room,
        "cpus": float(min(_WORKER_CPUS, cpus_of_pod(nodes) / room)),
        "gpus": float(min(1, nodes.gpus)),
        "custom": {f"farspan-{role}": 1.0},
    }


def _sizing(config: ServeConfig) -> dict[str, Any]:
    """Serve's policy for the whole application, where the number of workers is open."""
    if all(role.least == role.most for role in (config.prefill, config.decode)):
        return {}
    objectives = {"": [config.objectives.first_token_s, config.objectives.token_s]}
    return {"autoscaling_policy": {"policy_function": _SIZING, "policy_kwargs": {"objectives": objectives}}}


def _cluster_spec(spec: ClusterSpec, head: Manifest, groups: list[Manifest]) -> Manifest:
    return {
        "rayVersion": spec.software.ray,
        "authOptions": {"mode": "token", "secretName": spec.kubernetes.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 600,
            "resources": resources(1, 2),
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": "/home/farspan"}],
        },
        "headGroupSpec": head,
        "workerGroupSpecs": groups,
    }


def _resource(kind: str, name: str, body: Manifest) -> Manifest:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": body}
