"""What a cluster is made of and what it costs, before it exists."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.cluster.launcher import NODE_TYPES
from farspan.config.cluster import ClusterSpec


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One kind of node. Prices are per hour, in the currency of the plan; None where the spec gives none."""

    node_type: str
    machine: str
    gpus: int
    min_nodes: int
    max_nodes: int
    spot: bool
    idle_minutes: int | None
    price: float | None


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """`least` is the price of an hour when nobody works, `most` when every node runs; None: not known."""

    name: str
    provider: str
    place: str
    currency: str
    nodes: tuple[NodeCost, ...]
    least: float | None
    most: float | None


def plan_cluster(spec: ClusterSpec, provider: str) -> ClusterPlan:
    """The plan of a spec on aws, gcp or local; machines that are there already cost nothing more."""
    if provider == "local":
        machines = [("head", spec.local.head), *(("worker", worker) for worker in spec.local.workers)]
        nodes = tuple(NodeCost(kind, machine, 0, 1, 1, False, None, 0.0) for kind, machine in machines)
        return ClusterPlan(spec.name, provider, spec.local.head, spec.currency, nodes, 0.0, 0.0)
    nodes = tuple(_node(spec, name, provider) for name in NODE_TYPES)
    least = _total([(node.min_nodes, node.price) for node in nodes])
    most = _total([(node.max_nodes, node.price) for node in nodes])
    place = spec.aws.zone if provider == "aws" else spec.gcp.zone
    return ClusterPlan(spec.name, provider, place, spec.currency, nodes, least, most)


def _node(spec: ClusterSpec, name: str, provider: str) -> NodeCost:
    nodes = getattr(spec, NODE_TYPES[name])
    head = name == "head"
    return NodeCost(
        node_type=name,
        machine=nodes.aws if provider == "aws" else nodes.gcp,
        gpus=nodes.gpus,
        min_nodes=1 if head else nodes.min_nodes,
        max_nodes=1 if head else nodes.max_nodes,
        spot=nodes.spot,
        idle_minutes=None if head else nodes.idle_minutes,
        # The prices of the spec are those of AWS.
        price=nodes.price_per_hour if provider == "aws" and nodes.price_per_hour > 0 else None,
    )


def _total(priced: list[tuple[int, float | None]]) -> float | None:
    """None as soon as a node that runs has no price: half a sum would look cheap."""
    total = 0.0
    for count, price in priced:
        if count > 0 and price is None:
            return None
        total += count * (price or 0.0)
    return round(total, 2)
