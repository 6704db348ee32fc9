"""Whether workers find room on the nodes a cluster can have, before there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farspan.config.schema import ResourcesConfig, RoleConfig, RunConfig, ServeConfig

# Fractions of a CPU are sums of binary ones.
_NEARLY = 1e-9


@dataclass(frozen=True, slots=True)
class Ask:
    """Equal workers that are placed together."""

    field: str
    """Of the config, that says how many."""
    count: int
    bundle: Mapping[str, float]
    """What each of them asks Ray for."""


def training_bundle(asked: ResourcesConfig) -> dict[str, float]:
    """What one training process asks Ray for."""
    return {"CPU": asked.cpus_per_worker, **_gpus(asked.gpus_per_worker), **asked.custom}


def role_bundle(role: RoleConfig, num_ranks: int = 1) -> dict[str, float]:
    """What one worker of an endpoint asks Ray for; all its ranks are on one node."""
    return {"CPU": role.cpus * num_ranks, **_gpus(role.gpus * num_ranks), **role.custom}


def asks_of_run(config: RunConfig) -> list[Ask]:
    """An elastic run is content with its least."""
    count = config.parallel.min_workers or config.parallel.workers
    field = "parallel.min_workers" if config.parallel.min_workers else "parallel.workers"
    return [Ask(field, count, training_bundle(config.resources))]


def asks_of_endpoint(config: ServeConfig) -> list[Ask]:
    """Both roles; the ingress asks for next to nothing."""
    ranks = config.engine.tensor_parallel
    return [Ask(f"{name}.replicas", role.replicas, role_bundle(role, ranks)) for name, role in _roles(config)]


def misfits(launcher: Mapping[str, Any], asks: Sequence[Ask]) -> list[str]:
    """One sentence for each ask that the node types of a launcher file can never have room for.

    None where the file names no node types: machines that stay offer what they have.
    """
    types: dict[str, dict[str, Any]] = launcher.get("available_node_types", {})
    if not types:
        return []
    found = [sentence for ask in asks if (sentence := _misfit(types, ask)) is not None]
    return found or _too_much_together(types, asks)


def _misfit(types: Mapping[str, Mapping[str, Any]], ask: Ask) -> str | None:
    rooms = {name: room_in(node["resources"], ask.bundle) for name, node in types.items()}
    bundle = words(ask.bundle)
    if not any(rooms.values()):
        offers = "; ".join(f"{name} has {words(node['resources'])}" for name, node in types.items())
        return (
            f"{ask.field}: no node type has room for one worker of {bundle} ({offers}); ask for less, or larger nodes"
        )
    room = sum(count * _most(name, types[name]) for name, count in rooms.items())
    if room >= ask.count:
        return None
    largest = max(rooms, key=lambda name: rooms[name])
    missing = -(-(ask.count - room) // rooms[largest])
    return (
        f"{ask.field}: must find room on the nodes of the cluster, which have it for {room} workers of {bundle}, got "
        f"{ask.count}; allow {missing} more {largest} ({rooms[largest]} on each) with max_nodes, or ask for fewer"
    )


def _too_much_together(types: Mapping[str, Mapping[str, Any]], asks: Sequence[Ask]) -> list[str]:
    """What is asked for in sum: each ask may have room, and still not all of them."""
    found = []
    for name in sorted({name for ask in asks for name in ask.bundle}):
        wanted = sum(ask.count * ask.bundle.get(name, 0.0) for ask in asks)
        there = sum(_most(kind, node) * node["resources"].get(name, 0) for kind, node in types.items())
        if wanted > there + _NEARLY:
            fields = " and ".join(ask.field for ask in asks if name in ask.bundle)
            found.append(
                f"{fields}: ask for {wanted:g} {name} together, and all nodes have {there:g}; raise max_nodes, or ask "
                "for fewer"
            )
    return found


def room_in(offers: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many workers that ask for `bundle` a node with the resources `offers` takes."""
    return min(int((offers.get(name, 0) + _NEARLY) // amount) for name, amount in bundle.items() if amount > 0)


def _most(name: str, node: Mapping[str, Any]) -> int:
    # The head is there once, and its limit counts workers.
    return 1 if name == "head" else int(node["max_workers"])


def _roles(config: ServeConfig) -> list[tuple[str, RoleConfig]]:
    return [("prefill", config.prefill), ("decode", config.decode)]


def _gpus(count: float) -> dict[str, float]:
    return {"GPU": count} if count > 0 else {}


def words(resources: Mapping[str, float]) -> str:
    """Resources for a reader."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
