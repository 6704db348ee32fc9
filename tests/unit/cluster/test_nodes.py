"""Whether a run can ever begin on the nodes a cluster has, before it is submitted."""

from __future__ import annotations

import pytest

from farspan.cluster.nodes import Cluster, Node, no_memory, no_room
from farspan.cluster.placement import Ask

GIB = 2.0**30


def node(address: str, *, gpus: int = 0, cpus: int = 8) -> Node:
    if not gpus:
        return Node(address, {"CPU": cpus}, 16 * GIB)
    return Node(address, {"CPU": cpus, "GPU": gpus}, 64 * GIB, "NVIDIA L4", 24 * GIB)


CLUSTER = Cluster((node("10.0.0.1"), node("10.0.0.2", gpus=4), node("10.0.0.3", gpus=1)))


def workers(count: int, **bundle: float) -> Ask:
    return Ask("parallel.workers", count, bundle)


@pytest.mark.parametrize("ask", [workers(5, CPU=1, GPU=1), workers(24, CPU=1), workers(2, CPU=8, farspan=0)])
def test_workers_that_every_node_together_has_room_for_are_let_through(ask: Ask) -> None:
    assert no_room(CLUSTER, ask) is None


def test_more_workers_than_there_is_room_for_are_refused_with_how_many_there_is() -> None:
    assert str(no_room(CLUSTER, workers(6, CPU=1, GPU=1))) == (
        "parallel.workers: must find room on the cluster's nodes, which have it for 5 workers of 1 CPU, 1 GPU, got 6; "
        "ask for at most 5, or add nodes first"
    )


def test_one_worker_that_no_node_has_room_for_is_refused_with_what_they_have() -> None:
    assert str(no_room(CLUSTER, workers(1, CPU=9, GPU=1))) == (
        "parallel.workers: must find room on the cluster's nodes, and none has it for one worker of 9 CPU, 1 GPU (they "
        "have 8 CPU, 0 GPU; 8 CPU, 1 GPU; 8 CPU, 4 GPU), got 1; ask for less for each, or add larger nodes"
    )


@pytest.mark.parametrize(
    ("ask", "device", "host", "words"),
    [
        (workers(4, CPU=1, GPU=1), 25, 0, "are 25.0 GiB for each, and the largest GPU has 24.0 GiB"),
        (
            workers(4, CPU=1, GPU=1),
            20,
            40,
            "are 40.0 GiB for each, and the 2 nodes have 128.0 GiB in all, 64.0 GiB the",
        ),
        (workers(1, CPU=1, GPU=1), 20, 65, "64.0 GiB the largest"),
    ],
)
def test_states_that_no_memory_can_hold_are_refused(ask: Ask, device: float, host: float, words: str) -> None:
    found = no_memory(CLUSTER.with_room(ask.bundle), ask, device * GIB, host * GIB)
    assert words in str(found)


def test_without_a_gpu_what_a_device_holds_is_host_memory() -> None:
    ask, nodes = workers(4, CPU=1), [node("10.0.0.1"), node("10.0.0.4")]
    assert no_memory(nodes, ask, 8 * GIB, 0.0) is None
    assert "in all" in str(no_memory(nodes, ask, 8.1 * GIB, 0.0))


def test_of_nodes_that_do_not_say_what_they_have_nothing_is_claimed() -> None:
    ask = workers(4, CPU=1, GPU=1)
    unknown = Node("10.0.0.5", {"CPU": 8, "GPU": 8})
    assert no_memory([unknown], ask, 1e15, 1e15) is None
    assert no_memory([], ask, 1e15, 1e15) is None
    assert no_memory([Node("10.0.0.5", {"CPU": 8, "GPU": 8}, 64 * GIB)], ask, 1e15, 0.0) is None
