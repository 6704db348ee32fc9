"""Ray's autoscaler over nodes that are processes: `python -m tests.support.host_autoscaling QUESTION`, in a host.

QUESTION is JSON: `types` (node types of a launcher file), `address` of this host, and `asks`, each a list of bundles.
Prints one line of JSON for each ask, then what is left when nobody asks any more.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import AutoscalingCluster
from ray.util.placement_group import placement_group, remove_placement_group

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_OBJECTS_BYTES = 80_000_000
_PATIENCE_S, _IDLE_S = 90.0, 60.0
# Nobody starts a worker process for each of 192 CPUs of a node that is only pretended.
_FRUGAL = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}


class Cluster(AutoscalingCluster):
    """Its own template is missing in Ray's wheel."""

    def _generate_config(
        self,
        head_resources: dict[str, float],
        worker_node_types: dict[str, Any],
        autoscaler_v2: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        lists = (
            "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
            "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
            "rsync_filter",
        )  # fmt: skip
        return {
            "cluster_name": "pretended",
            "max_workers": sum(node["max_workers"] for node in worker_node_types.values()),
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10,
            "provider": {
                "type": "external",
                "module": _PROVIDER,
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": more["gcs_address"],
            },
            "auth": {"ssh_user": "nobody"},
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "head_node_type": "ray.head.default",
            "file_mounts": {},
            **{name: [] for name in lists},
        }


def kinds() -> list[str]:
    """The custom resource of each living worker node."""
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sorted(
        next((name for name in node if name.startswith("farspan-")), "cpu") for node in offered if "CPU" in node
    )


def main(question: str) -> None:
    """Ask one after another; each must be gone before the next one is asked."""
    given = json.loads(question)
    types = {
        name: {
            "resources": {**node["resources"], "object_store_memory": _OBJECTS_BYTES},
            "labels": node["labels"],
            "node_config": {},
            "min_workers": node["min_workers"],
            "max_workers": node["max_workers"],
        }
        for name, node in given["types"].items()
        if name != "head"
    }
    cluster = Cluster({"CPU": 0}, types, autoscaler_v2=True, gcs_address=f"{given['address']}:6379")
    cluster.start(override_env=_FRUGAL)
    ray.init(f"{given['address']}:6379", log_to_driver=False, logging_level="ERROR")
    for patience_s, bundles in given["asks"]:
        group = placement_group(bundles)
        ready = bool(group.wait(timeout_seconds=patience_s or _PATIENCE_S))
        print(json.dumps({"ready": ready, "kinds": kinds()}), flush=True)
        remove_placement_group(group)
        ends = time.monotonic() + _IDLE_S
        while kinds() and time.monotonic() < ends:
            time.sleep(0.5)
    print(json.dumps({"left": kinds()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
