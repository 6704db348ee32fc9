"""What stands around the Ray pods: namespace, account, who may talk to whom, disruptions, metrics."""

from __future__ import annotations

from farspan.cluster.pods import ACCOUNT, SERVE_PORT, Manifest
from farspan.config.cluster import ClusterSpec

_RAY = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
_HEAD = {"matchLabels": {"ray.io/node-type": "head"}}
# KubeRay labels the pod of its cleanup job so; without Redis it holds up the deletion of the cluster.
_HEAD_OR_CLEANUP = {
    "matchExpressions": [{"key": "ray.io/node-type", "operator": "In", "values": ["head", "redis-cleanup"]}]
}
_SUBMITTER = {"matchLabels": {"farspan-role": "submitter"}}
# Instance metadata: a pod that reaches it takes the node's role.
_METADATA = "169.254.169.254/32"
_POD_IDENTITY = "169.254.170.23/32"


def namespace(spec: ClusterSpec) -> Manifest:
    """Pods that do not keep the rules of this folder are not even admitted."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return _manifest("v1", "Namespace", spec.kubernetes.namespace) | {
        "metadata": {"name": spec.kubernetes.namespace, "labels": labels}
    }


def account() -> Manifest:
    """What pods run as. Give it the right to read and write your buckets; only heads get its Kubernetes token."""
    return _manifest("v1", "ServiceAccount", ACCOUNT) | {"automountServiceAccountToken": False}


def network_policies() -> list[Manifest]:
    """Everything is closed; then names are resolved, Ray talks to Ray, and one port is open to who is let in."""
    return [
        _policy("deny-all", {}, {"policyTypes": ["Ingress", "Egress"]}),
        _policy("names", {}, {"policyTypes": ["Egress"], "egress": [_dns()]}),
        _policy(
            "ray-to-ray",
            _RAY,
            {
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [{"podSelector": _RAY}]}],
                "egress": [{"to": [{"podSelector": _RAY}]}],
            },
        ),
        _policy("object-store-and-api-server", _RAY, {"policyTypes": ["Egress"], "egress": _outside()}),
        _policy("jobs-to-head", _SUBMITTER, {"policyTypes": ["Egress"], "egress": [_to(_HEAD, 8265)]}),
        _policy(
            "head-from-operator-and-jobs",
            _HEAD,
            {
                "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": _SUBMITTER}], "ports": [_tcp(8265)]},
                    {"from": [_namespace("kuberay-system")], "ports": [_tcp(8265), _tcp(SERVE_PORT), _tcp(52365)]},
                ],
            },
        ),
        _policy(
            "requests",
            _RAY,
            {
                "policyTypes": ["Ingress"],
                "ingress": [
                    {
                        "from": [{"namespaceSelector": {"matchLabels": {"farspan-ingress": "true"}}}],
                        "ports": [_tcp(SERVE_PORT)],
                    }
                ],
            },
        ),
        _policy(
            "metrics",
            _RAY,
            {
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [_namespace("monitoring")], "ports": [_tcp(8080), _tcp(44217), _tcp(44227)]}],
            },
        ),
    ]


def head_budget(resource: Manifest) -> Manifest:
    """A node is not drained under the head of this resource: all that runs in its cluster ends with it."""
    cluster = resource["metadata"]["name"]
    selector = {"matchLabels": {"farspan-cluster": cluster, "ray.io/node-type": "head"}}
    return _budget(f"{cluster}-head", selector, 1)


def worker_budgets(spec: ClusterSpec) -> list[Manifest]:
    """Of serving workers that are always several, one may go at that number. Where one may be alone there is no budget:
    its node could never be drained.
    """
    return [
        _budget(role, {"matchLabels": {"farspan-role": role}}, nodes.min_nodes - 1)
        for role, nodes in (("prefill", spec.prefill), ("decode", spec.decode))
        if nodes.min_nodes > 1
    ]


def pod_monitor() -> Manifest:
    """Prometheus (its operator) reads every Ray pod."""
    endpoint = {"port": "metrics", "interval": "30s"}
    spec = {"selector": _RAY, "podTargetLabels": ["ray.io/cluster", "farspan-role"], "podMetricsEndpoints": [endpoint]}
    return _manifest("monitoring.coreos.com/v1", "PodMonitor", "farspan") | {"spec": spec}


def queues(spec: ClusterSpec) -> list[Manifest]:
    """Kueue: jobs wait until all their pods fit."""
    flavor = _manifest("kueue.x-k8s.io/v1beta2", "ResourceFlavor", "farspan")
    quota = {
        "cpu": spec.train.cpus * spec.train.max_nodes + 8,
        "memory": f"{spec.train.memory_gib * spec.train.max_nodes + 2 * spec.head.memory_gib}Gi",
        "nvidia.com/gpu": spec.train.gpus * spec.train.max_nodes,
    }
    group = {
        "coveredResources": list(quota),
        "flavors": [{"name": "farspan", "resources": [{"name": name, "nominalQuota": n} for name, n in quota.items()]}],
    }
    cluster_queue = _manifest("kueue.x-k8s.io/v1beta2", "ClusterQueue", "farspan") | {
        "spec": {"namespaceSelector": {}, "resourceGroups": [group]}
    }
    local_queue = _manifest("kueue.x-k8s.io/v1beta2", "LocalQueue", spec.kubernetes.queue) | {
        "spec": {"clusterQueue": "farspan"}
    }
    return [flavor, cluster_queue, local_queue]


def redis_policy(spec: ClusterSpec) -> Manifest:
    """The head reaches Redis, and so does the job that clears it when a cluster is deleted."""
    port = int(spec.kubernetes.redis_address.rpartition(":")[2])
    egress = [{"to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [_tcp(port)]}]
    return _policy("head-to-redis", _HEAD_OR_CLEANUP, {"policyTypes": ["Egress"], "egress": egress})


def _dns() -> Manifest:
    where = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    return {"to": [where], "ports": [{"protocol": "UDP", "port": 53}, _tcp(53)]}


def _outside() -> list[Manifest]:
    anywhere = {"ipBlock": {"cidr": "0.0.0.0/0", "except": [_METADATA]}}
    return [
        {"to": [anywhere], "ports": [_tcp(443), _tcp(6443)]},
        {"to": [{"ipBlock": {"cidr": _POD_IDENTITY}}], "ports": [_tcp(80)]},
    ]


def _to(selector: Manifest, port: int) -> Manifest:
    return {"to": [{"podSelector": selector}], "ports": [_tcp(port)]}


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def _namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _policy(name: str, selector: Manifest, rules: Manifest) -> Manifest:
    return _manifest("networking.k8s.io/v1", "NetworkPolicy", name) | {"spec": {"podSelector": selector, **rules}}


def _budget(name: str, selector: Manifest, least: int) -> Manifest:
    # Not maxUnavailable, and no share: both ask the pods' controller how many there shall be, and a RayCluster has no
    # scale to ask for, so nothing could ever be evicted.
    return _manifest("policy/v1", "PodDisruptionBudget", name) | {
        # What does not work anyway holds no drain up.
        "spec": {"minAvailable": least, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": selector}
    }


def _manifest(api: str, kind: str, name: str) -> Manifest:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}}
