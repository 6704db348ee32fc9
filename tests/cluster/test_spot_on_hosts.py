"""EC2 takes a spot node back: Ray starts nothing more on it and goes on elsewhere. Of EC2 only the notice is a fake."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.cluster.test_ray_on_hosts import RayHosts, ray_on_hosts, wait_for
from tests.support.hosts import Host

REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE_S = 60.0
_TASKS = """
import os, sys
import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
def where():
    return os.uname().nodename

task = where.remote()
if len(sys.argv) > 2:
    done, _ = ray.wait([task], timeout=5)
    print("started" if done else "held back", flush=True)
print("ran on", ray.get(task, timeout=120), flush=True)
"""


def metadata(host: Host, cluster: RayHosts) -> subprocess.Popen[bytes]:
    """EC2's metadata service at its own address on a host."""
    answer = host.run("ip", "address", "add", "169.254.169.254/32", "dev", "lo")
    assert answer.returncode == 0, answer.stderr
    notice, log = cluster.folder / "notice", cluster.folder / "metadata.log"
    command = (sys.executable, "-m", "tests.support.metadata", "169.254.169.254", "80", str(notice))
    server = host.start(*command, log=log, env=cluster.environment(PYTHONPATH=str(REPOSITORY)))
    wait_for(log, "listens", server)
    return server


@pytest.mark.soak
def test_a_node_that_ec2_takes_back_gets_no_new_task_and_another_node_does() -> None:
    with ray_on_hosts() as cluster:
        spot = cluster.made[1]
        metadata(spot, cluster)
        log = cluster.folder / "watch.log"
        command = (sys.executable, "-m", "farspan.cli.main", "cluster", "watch-spot", "--poll", "0.2")
        watcher = spot.start(*command, log=log, env=cluster.environment())
        wait_for(log, "watching http://169.254.169.254", watcher)

        def tasks(*words: str, log: str) -> subprocess.Popen[bytes]:
            command = (sys.executable, "-c", _TASKS, cluster.address, *words)
            return cluster.made[0].start(*command, log=cluster.folder / log, env=cluster.environment())

        before = tasks(log="before.log")
        assert "ran on host1" in wait_for(cluster.folder / "before.log", "ran on", before)

        at = datetime.now(UTC) + timedelta(minutes=2)
        written = cluster.folder / "writing"
        written.write_text(f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}', encoding="ascii")
        written.rename(cluster.folder / "notice")
        assert "EC2 will terminate this machine" in wait_for(log, "Ray drains this node", watcher)
        assert watcher.wait(_PATIENCE_S) == 0

        after = tasks("held", log="after.log")
        assert "held back" in wait_for(cluster.folder / "after.log", "held back", after)
        cluster.start(0, f"--address={cluster.address}", "--num-cpus=1", log="other.log")
        assert "ran on host0" in wait_for(cluster.folder / "after.log", "ran on", after)
        assert after.wait(_PATIENCE_S) == 0
