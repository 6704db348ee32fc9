"""A manifest with one mistake is refused: by KubeRay's schema where a schema can say it, else by our rules."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.kuberay import kuberay_schemas

from farspan.cluster.policy import manifest_problems
from farspan.cluster.schemas import read_schemas, schema_problems
from farspan.errors import CorruptDataError, NotFoundError

REPOSITORY = Path(__file__).resolve().parents[3]
BASE = REPOSITORY / "infra" / "k8s" / "base"
Manifest = dict[str, Any]
Change = Callable[[list[Manifest]], None]


@functools.cache
def parsed() -> list[Manifest]:
    files = sorted(file for file in BASE.rglob("*.yaml") if file.name != "kustomization.yaml")
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def base() -> list[Manifest]:
    return copy.deepcopy(parsed())


def of(manifests: list[Manifest], kind: str) -> Manifest:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def cluster_of(manifests: list[Manifest]) -> Manifest:
    return of(manifests, "RayCluster")["spec"]


def worker(manifests: list[Manifest]) -> Manifest:
    return cluster_of(manifests)["workerGroupSpecs"][0]


def container(manifests: list[Manifest]) -> Manifest:
    return worker(manifests)["template"]["spec"]["containers"][0]


def test_the_base_has_no_problem() -> None:
    assert manifest_problems(base()) == []


def test_the_base_fits_the_schemas_of_kuberay() -> None:
    schemas = kuberay_schemas()
    assert [problem for manifest in base() for problem in schema_problems(manifest, schemas)] == []
    assert {"RayCluster.v1", "RayJob.v1", "RayService.v1"} <= set(schemas)


def put(find: Callable[[list[Manifest]], Manifest], key: str, value: object) -> Change:
    def change(manifests: list[Manifest]) -> None:
        find(manifests)[key] = value

    return change


def drop(find: Callable[[list[Manifest]], Manifest], key: str) -> Change:
    def change(manifests: list[Manifest]) -> None:
        del find(manifests)[key]

    return change


def pod(manifests: list[Manifest]) -> Manifest:
    return worker(manifests)["template"]["spec"]


def job(manifests: list[Manifest]) -> Manifest:
    return of(manifests, "RayJob")["spec"]


def closed(manifests: list[Manifest], name: str) -> Manifest:
    return next(m for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == name)["spec"]


def budget(manifests: list[Manifest]) -> Manifest:
    return of(manifests, "PodDisruptionBudget")["spec"]


def serve_text(old: str, new: str) -> Change:
    def change(manifests: list[Manifest]) -> None:
        spec = of(manifests, "RayService")["spec"]
        assert old in spec["serveConfigV2"]
        spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)

    return change


def overriding(option: str) -> Change:
    """The application with an option of its own for the deployment `prefill`."""
    return serve_text("  autoscaling_policy:", f"  deployments: [{{name: prefill, {option}}}]\n  autoscaling_policy:")


def another(manifest: Manifest) -> Change:
    return lambda manifests: manifests.append(manifest)


SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}}
SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"type": "LoadBalancer"}}
BUDGET = {
    "apiVersion": "policy/v1",
    "kind": "PodDisruptionBudget",
    "metadata": {"name": "decode"},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"farspan-role": "decode"}}},
}
QUEUED = {"kueue.x-k8s.io/queue-name": "farspan"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(container, "image", "registry.example.com/farspan:latest"), "no fixed tag"),
        (put(container, "image", "registry.example.com:5000/farspan"), "no fixed tag"),
        (put(lambda m: container(m)["securityContext"], "privileged", True), "it is privileged"),
        (put(lambda m: container(m)["securityContext"], "readOnlyRootFilesystem", False), "can be written"),
        (put(lambda m: container(m)["securityContext"], "allowPrivilegeEscalation", True), "may gain privileges"),
        (put(lambda m: container(m)["securityContext"], "capabilities", {"add": ["SYS_ADMIN"]}), "drop every"),
        (put(lambda m: pod(m)["securityContext"], "runAsNonRoot", False), "not as root"),
        (drop(lambda m: pod(m)["securityContext"], "seccompProfile"), "no seccomp profile"),
        (put(pod, "hostNetwork", True), "hostNetwork is on"),
        (put(pod, "automountServiceAccountToken", True), "into no other"),
        (put(pod, "volumes", [{"name": "n", "hostPath": {"path": "/"}}]), "a folder of the node"),
        (put(pod, "restartPolicy", "Always"), "restartPolicy must be Never"),
        (drop(lambda m: container(m)["resources"]["limits"], "memory"), "memory is not requested and limited"),
        (put(container, "env", [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]), "must come from a secret"),
        (put(container, "env", [{"name": "RAY_AUTH_TOKEN", "value": "x"}]), "RAY_AUTH_TOKEN is set by KubeRay"),
        (put(container, "env", [{"name": "A", "value": "AKIAIOSFODNN7EXAMPLE"}]), "a secret stands in it"),
        (put(lambda m: cluster_of(m)["authOptions"], "mode", "disabled"), "authOptions must be mode token"),
        (drop(cluster_of, "authOptions"), "authOptions must be mode token"),
        (drop(cluster_of, "rayVersion"), "rayVersion is missing"),
        (put(lambda m: cluster_of(m)["autoscalerOptions"], "version", "v1"), "version must be v2"),
        (put(cluster_of, "gcsFaultToleranceOptions", {"redisPassword": {"value": "x"}}), "must come from a secret"),
        (put(worker, "minReplicas", 9), "does not hold"),
        (put(worker, "groupName", "Not_A_Label"), "must be a DNS label"),
        (put(worker, "rayStartParams", {"num-cpus": "4"}), "belong to their own fields"),
        (put(lambda m: cluster_of(m)["headGroupSpec"], "resources", {"CPU": "8"}), "the head must offer no CPU"),
        (lambda m: cluster_of(m)["workerGroupSpecs"].append(worker(m)), "two worker groups have one name"),
        (put(job, "shutdownAfterJobFinishes", False), "would outlive its job"),
        (put(job, "clusterSelector", {"ray.io/cluster": "x"}), "one job, one cluster"),
        (put(lambda m: of(m, "RayJob")["metadata"], "labels", QUEUED), "must not scale by itself"),
        (put(lambda m: of(m, "RayJob")["metadata"], "name", "n" * 48), "longer than 47"),
        (overriding("num_replcas: 1"), "num_replcas is not a key of a deployment"),
        (serve_text("EveryNode", "HeadOnly"), "proxy_location must be EveryNode"),
        (serve_text("    api_key_file:", "    listener: ingress\n    api_key_file:"), "must be proxy, got ingress"),
        (serve_text("kv_bytes", "kv_bites"), "did you mean 'kv_bytes'?"),
        (serve_text("    api_key_file: /etc/farspan/api-keys/api_keys\n", ""), "without api_key_file"),
        (serve_text("farspan-decode", "farspan-decoder"), "no worker group offers farspan-decoder"),
        (serve_text("max_replicas: 4", "max_replicas: 9"), "prefill.max_replicas=9 finds no room"),
        (serve_text("autoscaling_policy", "autoscaling_polici"), "no autoscaling_policy says when"),
        (overriding("num_replicas: 1"), "num_replicas of prefill fixes what"),
        (put(budget, "maxUnavailable", 1), "must be minAvailable as a number"),
        (put(budget, "minAvailable", "50%"), "must be minAvailable as a number"),
        (drop(budget, "minAvailable"), "must be minAvailable as a number"),
        (another(BUDGET), "minAvailable must be less than minReplicas=0 of decode, got 1"),
        (drop(lambda m: closed(m, "names"), "egress"), "names cannot be resolved"),
        (put(lambda m: closed(m, "deny-all"), "policyTypes", ["Ingress"]), "nothing closes the namespace"),
        (put(lambda m: closed(m, "requests"), "ingress", [{"ports": []}]), "addresses outside the cluster"),
        (put(lambda m: of(m, "RayCluster"), "apiVersion", "ray.io/v1alpha1"), "its version must be ray.io/v1"),
        (another(SECRET), "never kept in a file"),
        (another(SERVICE), "opens a port to the world"),
    ],
)  # fmt: skip
def test_a_manifest_with_one_mistake_breaks_our_rules(change: Change, said: str) -> None:
    manifests = base()
    change(manifests)
    assert [problem for problem in manifest_problems(manifests) if said in problem] != [], manifest_problems(manifests)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(cluster_of, "enableInTreeAutoscalin", True), "enableInTreeAutoscalin"),
        (put(worker, "rayStartParams", {"num-cpus": 0}), "is not of type 'string'"),
        (put(worker, "maxReplicas", "four"), "is not of type 'integer'"),
        (drop(worker, "groupName"), "'groupName' is a required"),
        (put(container, "imagePullPolice", "Always"), "imagePullPolice"),
        (put(cluster_of, "gcsFaultToleranceOptions", {"backend": "etcd"}), "'etcd' is not one of"),
        (put(lambda m: cluster_of(m)["authOptions"], "mode", "on"), "'on' is not one of"),
        (put(lambda m: container(m)["resources"]["limits"], "memory", "lots"), "does not match"),
        (put(job, "entrypoints", "x"), "entrypoints"),
        (put(job, "backoffLimit", "2"), "is not of type 'integer'"),
        (put(lambda m: of(m, "RayService")["spec"], "serveConfigV2", {}), "is not of type 'string'"),
    ],
)
def test_a_manifest_with_one_mistake_breaks_kuberays_schema(change: Change, said: str) -> None:
    schemas = kuberay_schemas()
    manifests = base()
    change(manifests)
    found = [problem for manifest in manifests for problem in schema_problems(manifest, schemas)]
    assert [problem for problem in found if said in problem] != [], found


CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "spec": {
        "names": {"kind": "Thing"},
        "versions": [
            {
                "name": "v1",
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": {"type": "string"},
                            "kind": {"type": "string"},
                            "metadata": {"type": "object"},
                            "spec": {
                                "type": "object",
                                "properties": {
                                    "size": {"x-kubernetes-int-or-string": True, "pattern": "^[0-9]+(Gi)?$"},
                                    "items": {"type": "array", "items": {"type": "object", "properties": {"a": {}}}},
                                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                                },
                            },
                        },
                    }
                },
            }
        ],
    },
}


def test_crds_of_a_cluster_become_strict_schemas(tmp_path: Path) -> None:
    file = tmp_path / "crds.yaml"
    file.write_text(yaml.safe_dump({"kind": "List", "items": [CRD]}), encoding="utf-8")
    schemas = read_schemas(file)
    assert read_schemas(tmp_path) == schemas

    def thing(**spec: object) -> Manifest:
        return {"apiVersion": "x/v1", "kind": "Thing", "metadata": {"name": "t"}, "spec": spec}

    assert schema_problems(thing(size="5Gi", items=[{"a": 1}], free={"any": 1}), schemas) == []
    assert schema_problems(thing(size=5), schemas) == []
    assert "'lots' does not match" in schema_problems(thing(size="lots"), schemas)[0]
    assert "'sized' was unexpected" in schema_problems(thing(sized=5), schemas)[0]
    assert schema_problems(thing(items=[{"b": 1}]), schemas)[0].startswith("spec.items.0: ")


def test_schemas_that_are_missing_or_broken_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="kubectl get crd"):
        read_schemas(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(CorruptDataError, match="is not YAML or JSON of CRDs"):
        read_schemas(tmp_path / "broken.yaml")
