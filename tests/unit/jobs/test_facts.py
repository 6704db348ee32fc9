"""What the dashboard of a cluster says, as plain values."""

from __future__ import annotations

from typing import Any

import pytest

from farspan.cluster.nodes import Node
from farspan.jobs.facts import ask_cluster, grows_by_itself, node_of


def status(kinds: dict[str, str]) -> dict[str, Any]:
    return {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": kinds}}}


@pytest.mark.parametrize(
    ("said", "grows"),
    [
        # Where nothing is scaled, every node is a type of its own.
        (status({"3b9e": "node_3b9e", "77aa": "node_77aa"}), False),
        (status({"3b9e": "head", "77aa": "gpu"}), True),
        (status({}), None),
        ({"clusterStatus": None}, None),
        ({}, None),
    ],
)
def test_a_cluster_grows_where_an_autoscaler_names_its_nodes(said: dict[str, Any], grows: bool | None) -> None:
    assert grows_by_itself(said) is grows


def test_a_node_is_what_ray_counts_and_what_its_agent_saw() -> None:
    counted = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}
    gpus = [{"name": "NVIDIA H100 80GB HBM3", "memoryTotal": size} for size in (81559, 81000)]
    seen = {"mem": [64 * 2**30, 1, 2.0, 3], "gpus": gpus}
    assert node_of("10.0.0.1", counted, seen) == Node(
        "10.0.0.1", counted, 64.0 * 2**30, "NVIDIA H100 80GB HBM3", 81000.0 * 2**20
    )


def test_before_the_agents_first_look_only_what_ray_counts_is_known() -> None:
    counted = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}
    assert node_of("10.0.0.1", counted, {}) == Node("10.0.0.1", counted, None, "H100", None)
    assert node_of("10.0.0.1", {"CPU": 8.0}, {"mem": None, "gpus": []}) == Node("10.0.0.1", {"CPU": 8.0})


def test_a_cluster_that_does_not_answer_says_nothing() -> None:
    assert ask_cluster("http://127.0.0.1:9") is None
