"""An endpoint whose every process can be found, told when a request has come how far, and audited when all is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.state import list_actors
from tests.support.chaos_client import Asked, Client
from tests.support.local_ray import LocalRay
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.serve.app import APP_NAME, Running, handle_for_threads, run_app
from farspan.serve.messages import WorkerInfo
from farspan.serve.port import free_port

KEY = "sk-of-the-chaos"
LEASE_S = 15.0
# Until Serve has put another process in the place of one that says nothing.
_REPLACED_S = 150.0
_MIB = 1 << 20


class Component(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    AGENT = "agent"
    CONTROLLER = "controller"
    INGRESS = "ingress"
    PROXY = "proxy"

    @property
    def is_worker(self) -> bool:
        return self in (Component.PREFILL, Component.DECODE)


_CLASSES = {
    Component.PREFILL: f"ServeReplica:{APP_NAME}:prefill",
    Component.DECODE: f"ServeReplica:{APP_NAME}:decode",
    Component.INGRESS: f"ServeReplica:{APP_NAME}:api",
    Component.CONTROLLER: "ServeController",
    Component.PROXY: "ProxyActor",
    Component.AGENT: "NodeAgent",
}


@dataclass(frozen=True)
class Endpoint:
    running: Running
    listener: str
    dashboard: str
    handles: dict[Component, DeploymentHandle[Any]]
    """Made while the controller answers."""

    def client(self, *, asks_again: bool = False) -> Client:
        return Client(self.running.url, KEY, self.running.model, asks_again)

    def pids(self, component: Component) -> list[int]:
        found = list_actors(self.dashboard, filters=[("state", "=", "ALIVE")], timeout=30)
        return [actor.pid for actor in found if actor.class_name == _CLASSES[component]]

    def info(self, role: Component) -> WorkerInfo | None:
        """None: it does not answer now."""
        try:
            told: WorkerInfo = self.handles[role].info.remote().result(timeout_s=10)
        except (ray.exceptions.RayError, RayServeException, TimeoutError):
            return None
        return told

    def infos(self) -> list[WorkerInfo]:
        found = [self.info(role) for role in self.handles]
        return [info for info in found if info is not None]

    def wait_replaced(self, component: Component, pid: int) -> None:
        def is_there() -> bool:
            if component is Component.AGENT:
                # Looked for by who needs it.
                self._splits()
            return (now := self.pids(component)) != [pid] and len(now) == 1

        wait_until(is_there, f"one {component}", _REPLACED_S)
        if component.is_worker:
            wait_until(lambda: (told := self.info(component)) is not None and told.pid != pid, "it answers")

    def wait_whole(self) -> None:
        """Both roles are there, keep what they compute in host memory, and work together; nothing is held."""
        wait_until(lambda: len(self.infos()) == 2, "a worker of each role")
        wait_until(self._splits, "a prompt travels")
        wait_until(lambda: all(info.host is not None and not info.host.lost for info in self._asked()), "host memory")
        wait_until(lambda: len(found := self.infos()) == 2 and all(map(is_idle, found)), "nothing held", 2 * LEASE_S)
        for handle in self.handles.values():
            handle.check_integrity.remote().result(timeout_s=60)

    def _splits(self) -> bool:
        """Whether a request is computed by one worker and answered by the other, as if nothing had ever happened."""
        client = self.client(asks_again=True)
        # Both workers fill a page of it, and look for their host's agent.
        reading = client.start(
            Asked("probe", {"prompt": TEXT[5000:5200], "max_tokens": 20, "temperature": 0}), f"{time.monotonic()}"
        )
        client.whole(reading)
        trace = client.trace(reading)
        return bool(trace) and (trace["route"], trace["recovered"], trace["transport"]) == ("split", False, "nixl")

    def _asked(self) -> list[WorkerInfo]:
        """What workers say that were given something to do: they look for a lost agent only then."""
        self._splits()
        return self.infos()


def is_idle(info: WorkerInfo) -> bool:
    """Free or cached (which counts as free) or in quarantine: together all pages, and none in quarantine for ever."""
    return info.num_free == info.num_pages and not (info.num_requests or info.open_leases or info.num_quarantined)


def wait_until(what: Callable[[], bool], called: str, patience_s: float = 120.0) -> None:
    ends_s = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < ends_s, f"not in {patience_s:g} s: {called}"
        time.sleep(0.02)


@contextmanager
def chaos_endpoint(cluster: LocalRay, folder: Path, keys: Path, listener: str) -> Iterator[Endpoint]:
    """One worker of each role, which share the work on every prompt, and host memory."""
    keys.touch(mode=0o600)
    keys.write_text(KEY + "\n", encoding="ascii")
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        listener=listener,
        api_key_file=str(keys),
        engine=EngineConfig(
            dtype="float64", kv_bytes=64 * _MIB, max_batch_tokens=256, host_cache_bytes=64 * _MIB, threads=1
        ),
        transfer=TransferConfig(deadline_s=5, lease_s=LEASE_S, split="always"),
        drain_s=5,
        start_timeout_s=180,
    )
    with run_app(config) as running:
        roles = (Component.PREFILL, Component.DECODE)
        handles = {role: handle_for_threads(role.value) for role in roles}
        yield Endpoint(running, listener, cluster.dashboard, handles)
