"""A second Ray node on this machine, with an address of its own, that can be lost as machines are: all at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray._common.utils import get_ray_address_file

ADDRESS = "127.0.0.2"
_DEADLINE_S = 120.0


@dataclass(frozen=True)
class OtherNode:
    """`process` holds it; every process of the node descends from it."""

    process: subprocess.Popen[bytes]

    @property
    def node_id(self) -> str | None:
        """Ray's name of it while it lives."""
        return next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == ADDRESS), None)

    @property
    def port(self) -> int:
        """Where its raylet listens."""
        return next(int(n["NodeManagerPort"]) for n in ray.nodes() if n["NodeID"] == self.node_id)

    def kill(self) -> int:
        """SIGKILL to its raylet and to everything it runs, as when the power goes; how many processes there were."""
        victims = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        assert any("raylet" in victim.name() for victim in victims)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                os.kill(victim.pid, signal.SIGKILL)
        self.process.wait(timeout=_DEADLINE_S)
        return len(victims)

    def freeze(self) -> None:
        """SIGSTOP to everything it runs, as when its network goes: connections stay, and nobody answers."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGSTOP)

    def wait(self, *, alive: bool) -> None:
        """Until the cluster knows that it is there, or gone."""
        ends = time.monotonic() + _DEADLINE_S
        while (self.node_id is not None) != alive:
            assert time.monotonic() < ends, f"the cluster does not see that the node is {'there' if alive else 'gone'}"
            assert not alive or self.process.poll() is None, "the node did not start"
            time.sleep(0.2)


@contextmanager
def other_node(gcs_address: str, num_cpus: int) -> Iterator[OtherNode]:
    """Start it, and wait until the cluster has it. What it tells this machine of its cluster is taken back."""
    told = Path(get_ray_address_file(None))
    before = told.read_bytes() if told.exists() else None
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={gcs_address}", "--block"]
    limits = [f"--num-cpus={num_cpus}", f"--node-ip-address={ADDRESS}", f"--object-store-memory={100 << 20}"]
    process = subprocess.Popen([*command, *limits], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    node = OtherNode(process)
    try:
        node.wait(alive=True)
        yield node
    finally:
        if process.poll() is None:
            node.kill()
        # Killed, it cannot do so itself; whoever asks for "the" cluster later would wait for a dead one.
        told.unlink(missing_ok=True)
        if before is not None:
            told.write_bytes(before)
        node.wait(alive=False)
