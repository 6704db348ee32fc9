"""The agent of each machine as a Ray actor: what it keeps in host memory outlives every worker.

The first worker of a machine starts it; it belongs to no worker. It ends with the application, or by itself once no
worker was connected for a while.
"""

from __future__ import annotations

import threading

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farspan.errors import ConfigError, TierError
from farspan.kv.host_agent import HostAgent
from farspan.kv.host_cache import BlockCache
from farspan.kv.host_client import join_host_cache
from farspan.kv.layout import KvLayout

NAMESPACE = "farspan"
_NAME = "farspan-host-"
# A worker that starts beside a frozen agent waits so long, and goes on without.
_START_S = 30.0
# Longer than it takes to put a worker in the place of a lost one.
_LINGER_S = 600.0


class NodeAgent:
    """One machine's agent. It runs in a thread of its own."""

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        self._agent = HostAgent(capacity_bytes, slot_bytes)
        self._me = ray.get_runtime_context().current_actor
        self._thread = threading.Thread(target=self._run, name="host-agent", daemon=True)
        self._thread.start()

    def address(self) -> str:
        return self._agent.address

    def _run(self) -> None:
        try:
            self._agent.run(_LINGER_S)
        finally:
            # Nobody needs it, or it failed: whoever comes next starts another.
            ray.kill(self._me)


def open_host_cache(capacity_bytes: int, layout: KvLayout) -> BlockCache:
    """The cache of this machine's agent, which is started where there is none.

    Raises:
        ConfigError: the machine has less memory.
        TierError: the agent cannot be reached now.
    """
    try:
        address = ray.get(_agent(capacity_bytes, layout.page_bytes).address.remote(), timeout=_START_S)
    except ActorDiedError as problem:
        if "TierError" not in str(problem):
            raise TierError("host cache", f"the agent is lost: {type(problem).__name__}") from None
        reason = str(problem).strip().splitlines()[-1].rpartition("TierError: ")[2]
        raise ConfigError(
            "engine.host_cache_bytes", f"must fit into the machine ({reason})", capacity_bytes, "use less"
        ) from None
    except (RayError, ValueError) as problem:
        raise TierError("host cache", f"the agent cannot be reached: {type(problem).__name__}") from None
    return join_host_cache(address, layout.page_bytes)


def end_agents() -> None:
    """End the agents of every machine, and give their memory back."""
    if not ray.is_initialized():
        # Asking would start a Ray of its own.
        return
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == NAMESPACE and found["name"].startswith(_NAME):
            try:
                ray.kill(ray.get_actor(found["name"], namespace=NAMESPACE))
            except ValueError:
                # It ended by itself.
                continue


def _agent(capacity_bytes: int, slot_bytes: int) -> ActorHandle:
    node = ray.get_runtime_context().get_node_id()
    # Workers of another model or another config have blocks of another size, and an agent of their own.
    name = f"{_NAME}{node}-{slot_bytes}-{capacity_bytes}"
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    return ray.remote(NodeAgent).options(**options).remote(capacity_bytes, slot_bytes)
