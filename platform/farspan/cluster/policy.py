"""Our rules for manifests, and KubeRay's own that no schema can say. Each problem is one sentence with its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from farspan.cluster.pods import Manifest
from farspan.cluster.rayclusters import API
from farspan.cluster.secrets import holds_secret
from farspan.config.cluster_rules import is_fixed
from farspan.config.load import config_of
from farspan.config.schema import ServeConfig
from farspan.config.serve_rules import check_serve, is_loopback
from farspan.errors import ConfigError

_CLUSTERS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
_GROUP_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|API_?KEY|CREDENTIAL")
_KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
_MOST_NAME = 47
_MOST_GROUPS = 17


def manifest_problems(manifests: list[Manifest]) -> list[str]:
    """Everything wrong with manifests that are applied together."""
    found = []
    for manifest in manifests:
        place = f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')}"
        found += [f"{place}: {problem}" for problem in _problems(manifest)]
    return [*found, *_network_problems(manifests), *_budget_problems(manifests)]


def _problems(manifest: Manifest) -> Iterator[str]:
    kind = manifest.get("kind")
    if kind == "Secret":
        yield "secrets are made by hand or by a vault, never kept in a file"
    if holds_secret(manifest):
        yield "a secret stands in it"
    if kind == "Service" and manifest.get("spec", {}).get("type") in ("NodePort", "LoadBalancer"):
        yield "it opens a port to the world"
    if kind in _CLUSTERS:
        yield from _resource_problems(manifest)


def _resource_problems(manifest: Manifest) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if manifest.get("apiVersion") != API:
        yield f"its version must be {API}"
    if len(manifest.get("metadata", {}).get("name", "")) > _MOST_NAME:
        yield f"its name is longer than {_MOST_NAME} letters, which KubeRay refuses"
    yield from _cluster_problems(_cluster_of(manifest))
    if kind == "RayJob":
        yield from _job_problems(manifest)
    if kind == "RayService":
        yield from _service_problems(spec)


def _cluster_of(manifest: Manifest) -> Manifest:
    cluster = manifest.get("spec", {})
    for step in _CLUSTERS[manifest["kind"]]:
        cluster = cluster.get(step, {})
    return cluster


def _cluster_problems(cluster: Manifest) -> Iterator[str]:
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield "authOptions must be mode token with secretName: Ray's ports are open to the network without it"
    if "rayVersion" not in cluster:
        yield "rayVersion is missing, which the token needs"
    scales = cluster.get("enableInTreeAutoscaling", False)
    if scales and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version must be v2"
    storage = cluster.get("gcsFaultToleranceOptions", {})
    if "value" in storage.get("redisPassword", {}):
        yield "gcsFaultToleranceOptions.redisPassword must come from a secret"
    if storage.get("backend", "redis") == "rocksdb" and "redisAddress" in storage:
        yield "gcsFaultToleranceOptions: backend rocksdb takes no redisAddress"
    groups = cluster.get("workerGroupSpecs", [])
    names = [group.get("groupName", "") for group in groups]
    if len(set(names)) < len(names):
        yield "two worker groups have one name"
    if len(groups) > _MOST_GROUPS:
        yield f"more than {_MOST_GROUPS} worker groups"
    tls = cluster.get("tlsOptions", {}).get("enabled", False)
    for name, group in (("head", cluster.get("headGroupSpec", {})), *zip(names, groups, strict=True)):
        yield from (f"{name}: {problem}" for problem in _group_problems(group, head=group not in groups))
        yield from (f"{name}: {problem}" for problem in _ray_pod_problems(group, scales=scales, tls=tls))


def _group_problems(group: Manifest, *, head: bool) -> Iterator[str]:
    start = group.get("rayStartParams", {})
    if "num-cpus" in start or "num-gpus" in start or "resources" in start or "labels" in start:
        yield "resources and labels belong to their own fields, not to rayStartParams"
    if head:
        if group.get("resources", {}).get("CPU") != "0":
            yield "the head must offer no CPU to tasks"
        return
    if not _GROUP_NAME.fullmatch(group.get("groupName", "")):
        yield "groupName must be a DNS label"
    least, count, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
    if not 0 <= least <= count <= most:
        yield f"0 <= minReplicas <= replicas <= maxReplicas does not hold: {least}, {count}, {most}"


def _ray_pod_problems(group: Manifest, *, scales: bool, tls: bool) -> Iterator[str]:
    pod = group.get("template", {}).get("spec", {})
    head = "groupName" not in group
    yield from pod_problems(pod, token=head and scales)
    if scales and pod.get("restartPolicy") != "Never":
        yield "restartPolicy must be Never with the second autoscaler"
    for container in pod.get("containers", []):
        for variable in container.get("env", []):
            name = variable.get("name", "")
            if name.startswith("RAY_AUTH_") or name == "REDIS_PASSWORD":
                yield f"{name} is set by KubeRay, from its own field"
            if tls and name.startswith("RAY_TLS_"):
                yield f"{name} is set by KubeRay when tlsOptions is on"


def pod_problems(pod: Manifest, *, token: bool = False) -> Iterator[str]:
    """What a pod may not do; `token`: it may hold the token of its account."""
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        yield "the pod must run as a user, not as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "the pod has no seccomp profile"
    yield from (f"{key} is on" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
    if pod.get("automountServiceAccountToken") is not token:
        yield "the account's token belongs into the pod of an autoscaler and into no other"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume.get('name')} is a folder of the node"
    for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
        yield from (f"{container.get('name')}: {problem}" for problem in _container_problems(container))


def _container_problems(container: Manifest) -> Iterator[str]:
    image = container.get("image", "")
    if not is_fixed(image):
        yield f"image {image} has no fixed tag or digest"
    security = container.get("securityContext", {})
    if security.get("privileged"):
        yield "it is privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "it may gain privileges"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "its root file system can be written"
    capabilities = security.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or capabilities.get("add"):
        yield "it must drop every capability and add none"
    amounts = container.get("resources", {})
    for name in ("cpu", "memory"):
        if name not in amounts.get("limits", {}) or name not in amounts.get("requests", {}):
            yield f"{name} is not requested and limited"
    for variable in container.get("env", []):
        if _SECRET_NAME.search(variable.get("name", "").upper()) and "value" in variable:
            yield f"{variable['name']} must come from a secret"


def _job_problems(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield "shutdownAfterJobFinishes must be true: the cluster would outlive its job and cost"
    if "clusterSelector" in spec:
        yield "clusterSelector shares a cluster between jobs: one job, one cluster"
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        submitter = spec.get("submitterPodTemplate", {}).get("spec", {})
        yield from (f"submitter: {problem}" for problem in pod_problems(submitter))
    if _KUEUE_QUEUE in manifest.get("metadata", {}).get("labels", {}):
        if spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
            yield "a job in Kueue's queue must not scale by itself"
        if spec.get("suspend") is False:
            yield "suspend is Kueue's to set"


def _service_problems(spec: Manifest) -> Iterator[str]:
    try:
        serve = yaml.safe_load(spec.get("serveConfigV2", ""))
    except yaml.YAMLError:
        yield "serveConfigV2 is not YAML"
        return
    if not isinstance(serve, dict) or not serve.get("applications"):
        yield "serveConfigV2 names no application"
        return
    if serve.get("proxy_location", "EveryNode") != "EveryNode":
        yield "serveConfigV2: proxy_location must be EveryNode: KubeRay asks each worker pod for its proxy's health"
    groups = spec.get("rayClusterConfig", {}).get("workerGroupSpecs", [])
    for application in serve["applications"]:
        yield from (f"serveConfigV2: {problem}" for problem in _application_problems(application, groups))


def _application_problems(application: dict[str, Any], groups: list[Manifest]) -> Iterator[str]:
    known = {"name", "route_prefix", "import_path", "args", "deployments", "runtime_env", "autoscaling_policy"}
    # Serve itself lets misspelt keys pass.
    yield from (f"{key} is not a key of an application" for key in sorted(set(application) - known))
    arguments = application.get("args", {})
    try:
        config = config_of(ServeConfig, arguments)
        check_serve(config)
    except ConfigError as problem:
        yield f"args: {problem}"
    else:
        if config.listener != "proxy":
            yield f"args: listener must be proxy, got {config.listener}: KubeRay asks the proxies how a pod is"
        yield from _size_problems(application, config, groups)
    if not is_loopback(str(arguments.get("host", "127.0.0.1"))) and not arguments.get("api_key_file"):
        yield f"it listens on {arguments.get('host')} without api_key_file"
    deployment_keys = {"name", "num_replicas", "ray_actor_options", "max_ongoing_requests", "autoscaling_config"}
    offered = {name for group in groups for name in group.get("resources", {})}
    for deployment in application.get("deployments", []):
        yield from (f"{key} is not a key of a deployment" for key in sorted(set(deployment) - deployment_keys))
        wanted = set(deployment.get("ray_actor_options", {}).get("resources", {}))
        yield from (f"no worker group offers {name}" for name in sorted(wanted - offered))


def _size_problems(application: dict[str, Any], config: ServeConfig, groups: list[Manifest]) -> Iterator[str]:
    """What keeps the number of workers from following the load up to the largest size of their group."""
    fixed = {
        deployment.get("name") for deployment in application.get("deployments", []) if "num_replicas" in deployment
    }
    for name, role in (("prefill", config.prefill), ("decode", config.decode)):
        is_open = role.least != role.most
        if is_open and not application.get("autoscaling_policy"):
            yield f"args: {name} may change its size, and no autoscaling_policy says when"
        if is_open and name in fixed:
            yield f"num_replicas of {name} fixes what its min_replicas and max_replicas leave open"
        for resource, amount in role.custom.items():
            room = sum(_offer(group, resource) // amount * group.get("maxReplicas", 0) for group in groups)
            if not any(_offer(group, resource) for group in groups):
                yield f"no worker group offers {resource}"
            elif role.most > room:
                yield f"args: {name}.max_replicas={role.most} finds no room: the groups with {resource} take {room:g}"


def _offer(group: Manifest, resource: str) -> float:
    return float(group.get("resources", {}).get(resource, 0))


def _network_problems(manifests: list[Manifest]) -> Iterator[str]:
    policies = [m["spec"] for m in manifests if m.get("kind") == "NetworkPolicy"]
    if not any(m.get("kind") in _CLUSTERS for m in manifests) or not any(
        m.get("kind") == "Namespace" for m in manifests
    ):
        return
    everyone = [p for p in policies if p.get("podSelector") == {}]
    if not any({"Ingress", "Egress"} <= set(p.get("policyTypes", [])) and "egress" not in p for p in everyone):
        yield "network: nothing closes the namespace"
    opened = [port for p in everyone for rule in p.get("egress", []) for port in rule.get("ports", [])]
    if not {("UDP", 53), ("TCP", 53)} <= {(port.get("protocol"), port.get("port")) for port in opened}:
        yield "network: names cannot be resolved, so no Ray node would find its head"
    for policy in policies:
        for rule in policy.get("ingress", []):
            if not rule.get("from") or any("ipBlock" in source for source in rule["from"]):
                yield "network: a port is open to addresses outside the cluster"


def _budget_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A budget that Kubernetes cannot count, or that never lets a worker go."""
    fewest = {
        group.get("template", {}).get("metadata", {}).get("labels", {}).get("farspan-role"): group.get("minReplicas", 0)
        for manifest in manifests
        if manifest.get("kind") in _CLUSTERS
        for group in _cluster_of(manifest).get("workerGroupSpecs", [])
    }
    for budget in (m for m in manifests if m.get("kind") == "PodDisruptionBudget"):
        place, spec = f"PodDisruptionBudget {budget.get('metadata', {}).get('name')}", budget.get("spec", {})
        least, role = spec.get("minAvailable"), spec.get("selector", {}).get("matchLabels", {}).get("farspan-role")
        if "maxUnavailable" in spec or not isinstance(least, int):
            yield (
                f"{place}: it must be minAvailable as a number of pods: for maxUnavailable, or a share, "
                "Kubernetes asks a scale that RayClusters do not have, and evicts nothing"
            )
        elif role in fewest and least >= max(1, fewest[role]):
            yield (
                f"{place}: minAvailable must be less than minReplicas={fewest[role]} of {role}, got {least}: "
                "its node could never be drained"
            )
