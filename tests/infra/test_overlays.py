"""Every overlay, and every component on it, composed by kustomize and held against schemas and our rules."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.kuberay import REPOSITORY, kuberay_schemas, kustomize

from farspan.cluster.kubernetes import COMPONENTS, OVERLAYS
from farspan.cluster.policy import manifest_problems
from farspan.cluster.schemas import schema_problems

TREE = REPOSITORY / "infra" / "k8s"
KUBERNETES = "1.33"
# Not of Kubernetes: their schemas live in the projects that bring them.
GUESTS = {"ray.io", "monitoring.coreos.com", "kueue.x-k8s.io"}


def with_component(folder: Path, component: str) -> list[dict[str, Any]]:
    """The overlay `gpu` plus the development cluster, with one component on top."""
    shutil.copytree(TREE, folder / "k8s")
    overlay = folder / "k8s" / "overlays" / "tried"
    overlay.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../../base/{part}" for part in ("common", "cluster", "train", "serve")],
        "components": [f"../../components/{component}"],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return kustomize(overlay)


def clusters(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {m["kind"]: m["spec"] for m in manifests if m["kind"].startswith("Ray")}
    return {
        "RayCluster": found["RayCluster"],
        "RayJob": found["RayJob"]["rayClusterSpec"],
        "RayService": found["RayService"]["rayClusterConfig"],
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay: str) -> None:
    manifests = kustomize(TREE / "overlays" / overlay)
    assert manifest_problems(manifests) == []
    assert {m["metadata"].get("namespace", "farspan") for m in manifests} == {"farspan"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_schemas_of_kuberay(overlay: str) -> None:
    schemas = kuberay_schemas()
    manifests = kustomize(TREE / "overlays" / overlay)
    assert [problem for manifest in manifests for problem in schema_problems(manifest, schemas)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_schemas_of_kubernetes(overlay: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra dev)")
    kinds = set()
    for manifest in kustomize(TREE / "overlays" / overlay):
        if manifest["apiVersion"].rpartition("/")[0] not in GUESTS:
            validate.validate(manifest, KUBERNETES, strict=True)
            kinds.add(manifest["kind"])
    assert {"Namespace", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"} <= kinds


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_on_all_three_kinds_keeps_every_rule_and_schema(component: str, tmp_path: Path) -> None:
    schemas = kuberay_schemas()
    manifests = with_component(tmp_path, component)
    assert manifest_problems(manifests) == []
    assert [problem for manifest in manifests for problem in schema_problems(manifest, schemas)] == []


def test_components_change_what_they_say(tmp_path: Path) -> None:
    def composed(component: str) -> dict[str, dict[str, Any]]:
        return clusters(with_component(tmp_path / component, component))

    redis = composed("gcs-ft-redis")
    assert redis["RayService"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["key"]
    assert "gcsFaultToleranceOptions" not in redis["RayJob"]
    assert composed("gcs-ft-rocksdb")["RayCluster"]["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert {kind: c["tlsOptions"] for kind, c in composed("mtls").items()} == {
        kind: {"enabled": True} for kind in redis
    }
    queued = composed("kueue")
    assert [c["enableInTreeAutoscaling"] for c in queued.values()] == [True, False, True]
    spot = composed("spot")
    selectors = [g["template"]["spec"]["nodeSelector"] for g in spot["RayService"]["workerGroupSpecs"]]
    assert ["eks.amazonaws.com/capacityType" in selector for selector in selectors] == [True, False]
    rdma = composed("rdma")["RayService"]["workerGroupSpecs"]
    limits = [g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in rdma]
    assert [limit["vpc.amazonaws.com/efa"] for limit in limits] == ["1", "1"]


def test_only_a_head_whose_state_is_kept_may_be_drained(tmp_path: Path) -> None:
    def guarded(component: str) -> set[str]:
        manifests = with_component(tmp_path / component, component)
        return {m["metadata"]["name"] for m in manifests if m["kind"] == "PodDisruptionBudget"}

    assert guarded("spot") == {"farspan-head", "farspan-train-head", "farspan-serve-head"}
    assert [guarded(component) for component in ("gcs-ft-redis", "gcs-ft-rocksdb")] == [{"farspan-train-head"}] * 2


def test_only_overlays_for_clusters_with_its_operator_bring_a_pod_monitor() -> None:
    kinds = {overlay: {m["kind"] for m in kustomize(TREE / "overlays" / overlay)} for overlay in OVERLAYS}
    assert {overlay for overlay, found in kinds.items() if "PodMonitor" in found} == {"gpu", "prod"}


def test_prefill_and_decode_scale_apart() -> None:
    manifests = kustomize(TREE / "overlays" / "gpu")
    service = next(m for m in manifests if m["kind"] == "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["prefill", "decode"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["autoscaling_policy"]["policy_function"] == "farspan.serve.sizing:Sizing"
    # An override of the deployments' number would hold it.
    assert "deployments" not in application
    for group in groups:
        role, resource = application["args"][group["groupName"]], f"farspan-{group['groupName']}"
        room = int(group["resources"][resource])
        assert (set(group["resources"]), role["custom"]) == ({resource}, {resource: 1})
        bounds = group["minReplicas"] * room, group["maxReplicas"] * room
        assert (role["min_replicas"], role["max_replicas"]) == bounds
        assert bounds[0] <= role["replicas"] < bounds[1]
