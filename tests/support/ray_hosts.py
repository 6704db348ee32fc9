"""Real Ray nodes on hosts out of namespaces, with the switches that every cluster of ours has.

The first host has the head, which offers no CPU; each other one a worker node. What a test starts in a host ends with
it. Files all hosts share lie in `folder`, as on a file system that every node mounts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.hosts import Host, hosts

from farspan.cluster.certs import make_certificates
from farspan.cluster.environment import AUTH, HABITS, WATCHES, tls_switches

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
TOKEN = "a" * 64
START_S = 120.0
_LIMITS = ("--object-store-memory=80000000", "--memory=800000000", "--disable-usage-stats", "--block")


@dataclass
class Process:
    """Something that runs in a host, and what it says."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, word: str, patience_s: float = START_S) -> str:
        """Until it has said `word`; everything it said."""
        wait_until(lambda: word in self.text or self.popen.poll() is not None, patience_s, lambda: self.text)
        assert word in self.text, f"ended before it said {word!r}: {self.text}"
        return self.text

    def terminate(self) -> None:
        """SIGTERM to it, and not to the door it went through."""
        door = self.popen.pid
        os.kill(int(Path(f"/proc/{door}/task/{door}/children").read_text(encoding="ascii").split()[0]), signal.SIGTERM)

    def end(self, patience_s: float = START_S) -> tuple[int, str]:
        """Its exit code and everything it said."""
        return self.popen.wait(patience_s), self.text


@dataclass
class RayHosts:
    """The hosts, from head to last worker, and what their processes are told."""

    made: list[Host]
    folder: Path
    switches: dict[str, str] = field(default_factory=dict)
    """Of Ray, beside those that every cluster of ours has."""

    @property
    def address(self) -> str:
        """Of the head's GCS."""
        return f"{self.made[0].address}:6379"

    def environment(self, **changed: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "HOME": str(self.folder)}
        # A process in a host begins in its root folder.
        paths = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])])}
        return {**kept, **AUTH, **WATCHES, **HABITS, **token, **paths, **self.switches, **changed}

    def start(self, host: int, *words: str, log: str, **changed: str) -> Process:
        """Start a command in a host."""
        file = self.folder / log
        return Process(self.made[host].start(*words, log=file, env=self.environment(**changed)), file)

    def python(self, host: int, *words: str, log: str, **changed: str) -> Process:
        """Start Python in a host, with these arguments; it is told where the cluster is."""
        return self.start(host, sys.executable, *words, log=log, **{"RAY_ADDRESS": self.address, **changed})

    def farspan(self, host: int, *words: str, log: str, **changed: str) -> Process:
        """Start the `farspan` command in a host."""
        return self.python(host, "-m", "farspan.cli.main", *words, log=log, **changed)

    def head(self, log: str = "head.log", *more: str) -> Process:
        return self._node(0, log, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", *more)

    def worker(self, host: int, resources: Mapping[str, float], log: str | None = None) -> Process:
        custom = json.dumps({name: amount for name, amount in resources.items() if name != "CPU"})
        offers = (f"--num-cpus={resources['CPU']:g}", f"--resources={custom}")
        return self._node(host, log or f"worker{host}.log", f"--address={self.address}", *offers)

    def _node(self, host: int, log: str, *words: str) -> Process:
        """`ray start` on a host, until it says that it runs."""
        found = self.start(
            host, RAY, "start", f"--node-ip-address={self.made[host].address}", *words, *_LIMITS, log=log
        )
        found.wait_for("Ray runtime started")
        return found


def wait_until(what: Callable[[], bool], patience_s: float, said: Callable[[], str]) -> None:
    """Look ten times a second."""
    ends = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < ends, f"not in {patience_s:g} s: {said()}"
        time.sleep(0.1)


@contextmanager
def ray_on_hosts(
    *workers: Mapping[str, float], tls: bool = False, lasting: bool = False, own_name_is_loopback: bool = False
) -> Iterator[RayHosts]:
    """A head, and one worker node for each set of resources.

    `tls`: they trust only our certificates. `lasting`: the head's state is on its disk.
    """
    with shared_folder() as folder, hosts(1 + len(workers), own_name_is_loopback=own_name_is_loopback) as made:
        found = RayHosts(made, folder)
        if tls:
            make_certificates(folder / "tls", [host.address for host in made], 1)
            found.switches |= tls_switches(str(folder / "tls"))
        if lasting:
            found.switches |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
        found.head()
        # One after the other: a node has half a minute to start, whoever else is starting.
        for host, resources in enumerate(workers, start=1):
            found.worker(host, resources)
        yield found


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that every host sees, with a token in it. Not under /tmp, of which every host has its own."""
    folder = Path(tempfile.mkdtemp(prefix="farspan-ray-hosts-", dir="/var/tmp"))
    try:
        (folder / "token").write_text(TOKEN, encoding="ascii")
        (folder / "token").chmod(0o600)
        yield folder
    finally:
        shutil.rmtree(folder)
