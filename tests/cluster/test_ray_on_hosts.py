"""Ray on hosts of their own: the token lets nobody else in, and a silent partition is noticed and mended in time.

The nodes get the switches of `farspan.cluster.environment`, as the rendered files give them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.hosts import Host, hosts

from farspan.cluster.certs import make_certificates, ray_variables
from farspan.cluster.environment import AUTH, HABITS, WATCHES

RAY = str(Path(sys.executable).parent / "ray")
_START_S = 120.0
_LIMITS = ("--object-store-memory=80000000", "--memory=800000000", "--disable-usage-stats", "--block")
# Issue: a partition is over in half a minute, where Ray's defaults take more than one and lose the tasks.
_NOTICED_S = 30.0
_PLAINTEXT_S = 40.0
# Two tasks on the other host; both must end, though their host is cut off when the first has begun.
_DRIVER = """
import os, sys, time
import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, max_retries=10)
def where(seconds):
    print("began", flush=True)
    time.sleep(seconds)
    return os.uname().nodename

def alive():
    return sum(node["Alive"] for node in ray.nodes())

print("ran on", ray.get(where.remote(0), timeout=60), flush=True)
if len(sys.argv) > 2:
    task = where.remote(5)
    time.sleep(1)
    print("cut now", flush=True)
    begin = time.monotonic()
    while alive() == 2 and time.monotonic() - begin < 120:
        time.sleep(0.2)
    print("noticed after", time.monotonic() - begin, flush=True)
    print("ran again on", ray.get(task, timeout=120), flush=True)
"""
# An actor that outlives its driver; the last word is its count, then the process it lives in.
_COUNTER = """
import os, sys
import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="test")

@ray.remote(num_cpus=1)
class Counter:
    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        return self.count, os.getpid()

counter = Counter.options(name="counter", lifetime="detached", get_if_exists=True).remote()
print("counted", *ray.get(counter.add.remote(), timeout=60), flush=True)
"""


@dataclass
class RayHosts:
    """A head without CPUs on the first host, one worker on the second."""

    made: list[Host]
    folder: Path
    switches: dict[str, str]
    """Of Ray, beside those that every cluster of ours has."""

    @property
    def address(self) -> str:
        return f"{self.made[0].address}:6379"

    def environment(self, **changed: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "HOME": str(self.folder)}
        return {**kept, **AUTH, **WATCHES, **HABITS, **token, **self.switches, **changed}

    def start(self, host: int, *words: str, log: str) -> subprocess.Popen[bytes]:
        """`ray start` on a host, until it says that it runs."""
        file = self.folder / log
        command = (RAY, "start", f"--node-ip-address={self.made[host].address}", *words, *_LIMITS)
        process = self.made[host].start(*command, log=file, env=self.environment())
        wait_for(file, "Ray runtime started", process)
        return process

    def worker(self, log: str) -> subprocess.Popen[bytes]:
        return self.start(1, f"--address={self.address}", "--num-cpus=1", log=log)

    def head(self, log: str) -> subprocess.Popen[bytes]:
        return self.start(0, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", log=log)

    def count(self, log: str) -> list[str]:
        """Let the lasting actor count once, from its own host; gives its count and its process."""
        command = (sys.executable, "-c", _COUNTER, self.address)
        driver = self.made[1].start(*command, log=self.folder / log, env=self.environment())
        text = wait_for(self.folder / log, "counted", driver)
        assert driver.wait(_START_S) == 0
        return text.partition("counted ")[2].split()[:2]

    def driver(self, *words: str, log: str, **changed: str) -> subprocess.Popen[bytes]:
        command = (sys.executable, "-c", _DRIVER, self.address, *words)
        return self.made[0].start(*command, log=self.folder / log, env=self.environment(**changed))


def wait_for(file: Path, word: str, process: subprocess.Popen[bytes], patience_s: float = _START_S) -> str:
    ends = time.monotonic() + patience_s
    while word not in (text := file.read_text(encoding="utf-8", errors="replace")):
        assert time.monotonic() < ends, f"no {word!r} in {patience_s:g} s: {text}"
        assert process.poll() is None or word in file.read_text(encoding="utf-8", errors="replace"), text
        time.sleep(0.1)
    return text


@contextmanager
def ray_on_hosts(*, tls: bool = False, lasting: bool = False) -> Iterator[RayHosts]:
    # Not under /tmp, of which every host has its own.
    folder = Path(tempfile.mkdtemp(prefix="farspan-ray-hosts-", dir="/var/tmp"))
    try:
        (folder / "token").write_text("a" * 64, encoding="ascii")
        (folder / "token").chmod(0o600)
        with hosts(2) as made:
            switches = {}
            if tls:
                make_certificates(folder / "tls", [host.address for host in made], 1)
                switches = ray_variables(folder / "tls")
            if lasting:
                switches = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
            found = RayHosts(made, folder, switches)
            found.head("head.log")
            found.worker("worker.log")
            yield found
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_on_hosts() as found:
        yield found


@pytest.mark.soak
def test_a_driver_on_one_host_runs_a_task_on_the_other(cluster: RayHosts) -> None:
    driver = cluster.driver(log="driver.log")
    assert "ran on host1" in wait_for(cluster.folder / "driver.log", "ran on", driver)
    assert driver.wait(_START_S) == 0


@pytest.mark.parametrize("token", ["b" * 64, pytest.param(None, marks=pytest.mark.soak)], ids=["wrong", "none"])
def test_a_driver_with_a_wrong_token_or_none_is_refused_and_told_why(token: str | None, cluster: RayHosts) -> None:
    stranger = cluster.folder / "stranger"
    stranger.unlink(missing_ok=True)
    if token is not None:
        stranger.write_text(token, encoding="ascii")
        stranger.chmod(0o600)
    driver = cluster.driver(log="stranger.log", RAY_AUTH_TOKEN_PATH=str(stranger))
    assert driver.wait(_START_S) != 0
    text = (cluster.folder / "stranger.log").read_text(encoding="utf-8")
    assert "AuthenticationError" in text
    assert "ran on" not in text
    assert "a" * 64 not in text


def test_a_cut_host_is_noticed_in_time_and_its_task_runs_again(cluster: RayHosts) -> None:
    log = cluster.folder / "cut.log"
    driver = cluster.driver("cut", log="cut.log")
    wait_for(log, "cut now", driver)
    cluster.made[1].cut()
    try:
        text = wait_for(log, "noticed after", driver, 150)
    finally:
        cluster.made[1].restore()
    noticed_s = float(text.partition("noticed after ")[2].split()[0])
    assert noticed_s < _NOTICED_S
    # The node that was taken for dead ends itself; one like it takes its place.
    cluster.worker("again.log")
    assert "ran again on host1" in wait_for(log, "ran again on", driver)
    assert driver.wait(_START_S) == 0


@pytest.mark.soak
def test_with_our_certificates_hosts_trust_each_other_and_a_plaintext_driver_gets_nowhere() -> None:
    with ray_on_hosts(tls=True) as secure:
        driver = secure.driver(log="secure.log")
        assert "ran on host1" in wait_for(secure.folder / "secure.log", "ran on", driver)
        assert driver.wait(_START_S) == 0
        # It has the token, and still nobody understands it. Ray tries for longer than we watch.
        plain = secure.driver(log="plain.log", RAY_USE_TLS="0")
        with suppress(subprocess.TimeoutExpired):
            assert plain.wait(_PLAINTEXT_S) != 0
        assert "ran on" not in (secure.folder / "plain.log").read_text(encoding="utf-8")
        plain.kill()
        plain.wait(_START_S)


@pytest.mark.soak
def test_a_head_that_crashes_comes_back_with_its_state_on_disk_and_an_actor_never_notices() -> None:
    with ray_on_hosts(lasting=True) as found:
        assert found.count("first.log")[0] == "1"
        before = found.count("second.log")
        found.made[0].crash()
        found.head("reborn.log")
        after = found.count("third.log")
        # The same process went on counting: it was not started again.
        assert (before, after) == (["2", before[1]], ["3", before[1]])
