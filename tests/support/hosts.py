"""Hosts out of network namespaces on one machine: own network, processes, mounts and name, on one switch.

Each host holds an address on a bridge that leads nowhere else. Its link can be cut, restored, and capped by a token
bucket; killing it kills every process in it at once, as when the power goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]
_DEADLINE_S = 30.0
_NEEDS = ("ip", "unshare", "nsenter", "setpriv", "tc", "mount")
# Names first: they lie in /tmp, which each host then has of its own, as shared memory; then it waits to be killed.
_SETUP = """
set -e
hostname {name}
mount --make-rprivate /
mount --bind {etc}/hosts /etc/hosts
mount --bind {etc}/resolv.conf /etc/resolv.conf
mount --bind {etc}/nsswitch.conf /etc/nsswitch.conf
mount -t tmpfs -o size={tmp_mb}m tmpfs /tmp
mount -t tmpfs -o size={shm_mb}m tmpfs /dev/shm
echo ready
exec sleep infinity
"""


@dataclass
class Host:
    """One host: `address` on the switch, and the process whose end is its end."""

    name: str
    address: str
    netns: str
    link: str
    """Our end of its cable."""
    first: subprocess.Popen[str] = field(repr=False)

    @property
    def pid(self) -> int:
        """The first process inside, as this machine counts."""
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text(encoding="ascii").split()
        return int(children[0])

    def command(self, *words: str) -> list[str]:
        """`words`, to be run inside."""
        return ["nsenter", "-t", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc", "--", *words]

    def run(self, *words: str, timeout_s: float = _DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Run to the end inside; its output comes back."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout_s, check=False)

    def start(self, *words: str, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start inside and go on; it ends with the host at the latest."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
            )

    def cut(self) -> None:
        """Its cable is pulled: packets vanish, nobody is told."""
        _do("ip", "link", "set", self.link, "down")

    def restore(self) -> None:
        """The cable is back."""
        _do("ip", "link", "set", self.link, "up")

    def cap(self, megabits: float) -> None:
        """What it sends and what it receives is held to this rate, each way."""
        self.uncap()
        rate = ("tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "100ms")
        _do("tc", "qdisc", "add", "dev", self.link, "root", *rate)
        _do("ip", "netns", "exec", self.netns, "tc", "qdisc", "add", "dev", "eth0", "root", *rate)

    def uncap(self) -> None:
        """As fast as the machine is."""
        for words in (("tc",), ("ip", "netns", "exec", self.netns, "tc")):
            device = self.link if words == ("tc",) else "eth0"
            subprocess.run(
                [*words, "qdisc", "del", "dev", device, "root"], capture_output=True, timeout=_DEADLINE_S, check=False
            )

    def received_bytes(self) -> int:
        """What has come in over its cable."""
        # What its end receives, ours sends.
        return int(Path(f"/sys/class/net/{self.link}/statistics/tx_bytes").read_text(encoding="ascii"))

    def crash(self) -> None:
        """Everything that was started inside ends at once; the host stays, as after a reboot."""
        self.run("sh", "-c", "kill -9 -1")

    def kill(self) -> None:
        """The power goes: everything inside ends at once."""
        if self.first.poll() is None:
            with suppress(ProcessLookupError, IndexError, FileNotFoundError):
                os.kill(self.pid, signal.SIGKILL)
            self.first.kill()
        self.first.wait(_DEADLINE_S)
        if self.first.stdout is not None:
            self.first.stdout.close()


@contextmanager
def hosts(
    count: int, *, shm_mb: int = 512, tmp_mb: int = 2048, own_name_is_loopback: bool = False
) -> Iterator[list[Host]]:
    """`count` hosts on one switch; where this machine does not allow them the test is skipped, and says so.

    `own_name_is_loopback`: each takes its own name for 127.0.1.1, as Debian and Ubuntu install it.
    """
    _require()
    key = uuid.uuid4().hex[:6]
    bridge, subnet = f"fb{key}", f"10.{64 + int(key[:2], 16) % 64}.{int(key[2:4], 16)}"
    made: list[Host] = []
    folder = Path(tempfile.mkdtemp(prefix="farspan-hosts-"))
    try:
        _do("ip", "link", "add", bridge, "type", "bridge")
        _do("ip", "address", "add", f"{subnet}.254/24", "dev", bridge)
        _do("ip", "link", "set", bridge, "up")
        names = {f"host{i}": f"{subnet}.{i + 1}" for i in range(count)}
        for i, (name, address) in enumerate(names.items()):
            known = {**names, name: "127.0.1.1"} if own_name_is_loopback else names
            _write_names(folder / name, known)
            made.append(
                _host(
                    name,
                    address,
                    f"f{key}{i}",
                    bridge,
                    _SETUP.format(name=name, etc=folder / name, tmp_mb=tmp_mb, shm_mb=shm_mb),
                )
            )
        yield made
    finally:
        for host in made:
            host.kill()
        for i in range(count):
            for words in (("ip", "netns", "del", f"f{key}{i}"), ("ip", "link", "del", f"f{key}{i}")):
                subprocess.run(words, capture_output=True, timeout=_DEADLINE_S, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, timeout=_DEADLINE_S, check=False)
        shutil.rmtree(folder)


def _host(name: str, address: str, netns: str, bridge: str, setup: str) -> Host:
    _do("ip", "netns", "add", netns)
    _do("ip", "link", "add", netns, "type", "veth", "peer", "name", "eth0", "netns", netns)
    _do("ip", "link", "set", netns, "master", bridge, "up")
    for words in (
        ("address", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
    ):
        _do("ip", "-n", netns, *words)
    # Also no shared memory of System V: a transport would find it and never touch the wire.
    inside = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child")
    # A test process that is ended from outside takes its hosts along.
    tied = ("setpriv", "--pdeathsig", "KILL")
    first = subprocess.Popen(
        ["ip", "netns", "exec", netns, *tied, *inside, "sh", "-c", setup],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert first.stdout is not None
    said = first.stdout.readline()
    host = Host(name, address, netns, netns, first)
    if said != "ready\n":
        host.kill()
        pytest.skip(f"hosts out of namespaces are not allowed here: {said.strip()}")
    return host


def _write_names(folder: Path, names: dict[str, str]) -> None:
    folder.mkdir()
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="ascii")
    (folder / "resolv.conf").write_text("", encoding="ascii")
    (folder / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n", encoding="ascii")


def hidden_by_tmp(*paths: str | Path) -> str | None:
    """The first of these paths that no host could see, since each mounts a fresh /tmp."""
    tmp = Path("/tmp").resolve()
    return next((str(path) for path in paths if Path(path).resolve().is_relative_to(tmp)), None)


def _require() -> None:
    missing = [name for name in _NEEDS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"hosts out of namespaces need {', '.join(missing)}")
    if (refused := _refused(f"fp{uuid.uuid4().hex[:6]}")) is not None:
        pytest.skip(f"hosts out of namespaces are not allowed here: {refused}")
    hidden = hidden_by_tmp(sys.prefix, sys.base_prefix, _REPOSITORY)
    if hidden is not None:
        pytest.skip(f"hosts have a /tmp of their own and would not see {hidden}: move it out of /tmp")


def _refused(probe: str) -> str | None:
    """Make one of each thing hosts are made of, and take it away; what this machine said where it refused."""
    link, bridge = f"{probe}l", f"{probe}b"
    try:
        for words in (
            f"ip netns add {probe}",
            f"ip link add {bridge} type bridge",
            f"ip link add {link} type veth peer name eth0 netns {probe}",
            f"ip link set {link} master {bridge} up",
            f"tc qdisc add dev {link} root tbf rate 1mbit burst 64kb latency 100ms",
        ):
            if (problem := _problem(*words.split())) is not None:
                return problem
        return None
    finally:
        for words in (f"ip link del {link}", f"ip link del {bridge}", f"ip netns del {probe}"):
            _problem(*words.split())


def _problem(*words: str) -> str | None:
    answer = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    return None if answer.returncode == 0 else f"{' '.join(words)}: {answer.stderr.strip()}"


def _do(*words: str) -> None:
    problem = _problem(*words)
    assert problem is None, problem
