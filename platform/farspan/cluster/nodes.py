"""The nodes a running cluster has, in plain values, and whether workers can find room on them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.cluster.placement import Ask, room_in, words
from farspan.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a cluster, as Ray counts it and as it is. None: it did not say."""

    address: str
    resources: Mapping[str, float]
    memory_bytes: float | None = None
    gpu: str | None = None
    """Name of its GPU with the least memory."""
    gpu_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that are there now."""

    nodes: tuple[Node, ...]
    grows: bool | None = None
    """Whether an autoscaler adds others; none: the cluster does not say."""

    def with_room(self, bundle: Mapping[str, float]) -> list[Node]:
        """Nodes that take at least one worker which asks for `bundle`, whoever uses them now."""
        return [node for node in self.nodes if room_in(node.resources, bundle) > 0]


def no_room(cluster: Cluster, ask: Ask) -> ConfigError | None:
    """Why so many workers find no room on the nodes that are there, however long they wait; none: they do."""
    bundle, fitting = words(ask.bundle), cluster.with_room(ask.bundle)
    if not fitting:
        # A large cluster has few kinds of nodes.
        offers = "; ".join(sorted({words(_of(node, ask.bundle)) for node in cluster.nodes}))
        rule = f"must find room on the cluster's nodes, and none has it for one worker of {bundle} (they have {offers})"
        return ConfigError(ask.field, rule, ask.count, "ask for less for each, or add larger nodes")
    room = sum(room_in(node.resources, ask.bundle) for node in fitting)
    if room >= ask.count:
        return None
    rule = f"must find room on the cluster's nodes, which have it for {room} workers of {bundle}"
    return ConfigError(ask.field, rule, ask.count, f"ask for at most {room}, or add nodes first")


def no_memory(nodes: Sequence[Node], ask: Ask, device: float, host: float) -> ConfigError | None:
    """Why workers that each hold so many bytes on their device, and in host memory, can not be on these nodes.

    Without a GPU the device is host memory too. None: they may be, or the nodes do not say what they have.
    """
    sizes = [node.memory_bytes for node in nodes if node.memory_bytes is not None]
    if len(sizes) < len(nodes) or not nodes:
        return None
    held = "weights, gradients and optimizer states alone are"
    if "GPU" in ask.bundle:
        largest = max(node.gpu_bytes or float("inf") for node in nodes)
        if device > largest:
            rule = (
                f"must fit each worker's GPU: {held} {_gib(device)} for each, and the largest GPU has {_gib(largest)}"
            )
            return ConfigError(ask.field, rule, ask.count, "use more workers, or LoRA (lora.rank)")
    in_host = host if "GPU" in ask.bundle else host + device
    if in_host * ask.count > sum(sizes) or in_host > max(sizes):
        rule = (
            f"must fit the nodes' memory: {held} {_gib(in_host)} for each, and the {len(nodes)} nodes have "
            f"{_gib(sum(sizes))} in all, {_gib(max(sizes))} the largest"
        )
        return ConfigError(ask.field, rule, ask.count, "use a smaller model, LoRA (lora.rank), or add nodes first")
    return None


def _of(node: Node, bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: node.resources.get(name, 0.0) for name in bundle}


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
