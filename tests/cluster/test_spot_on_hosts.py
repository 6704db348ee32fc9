"""EC2 takes a spot node back: Ray starts nothing more on it and goes on elsewhere. Of EC2 only the notice is a fake."""

from datetime import UTC, datetime, timedelta

import pytest
from tests.support.ray_hosts import Process, RayHosts, ray_on_hosts

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


def start_metadata(cluster: RayHosts, host: int) -> None:
    """EC2's metadata service at its own address on a host; it tells what the file `notice` says."""
    answer = cluster.made[host].run("ip", "address", "add", "169.254.169.254/32", "dev", "lo")
    assert answer.returncode == 0, answer.stderr
    words = ("-m", "tests.support.metadata", "169.254.169.254", "80", str(cluster.folder / "notice"))
    cluster.python(host, *words, log="metadata.log").wait_for("listens")


@pytest.mark.soak
def test_a_node_that_ec2_takes_back_gets_no_new_task_and_another_node_does() -> None:
    with ray_on_hosts({"CPU": 1}) as cluster:
        start_metadata(cluster, 1)
        watcher = cluster.farspan(1, "cluster", "watch-spot", "--poll", "0.2", log="watch.log")
        watcher.wait_for("watching http://169.254.169.254")

        def start_task(*words: str, log: str) -> Process:
            return cluster.python(0, "-c", _TASKS, cluster.address, *words, log=log)

        assert "ran on host1" in start_task(log="before.log").wait_for("ran on")

        at = datetime.now(UTC) + timedelta(minutes=2)
        written = cluster.folder / "writing"
        written.write_text(f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}', encoding="ascii")
        written.rename(cluster.folder / "notice")
        code, said = watcher.end(_PATIENCE_S)
        assert code == 0
        assert "EC2 will terminate this machine" in said
        assert "Ray drains this node" in said

        after = start_task("held", log="after.log")
        after.wait_for("held back")
        cluster.worker(0, {"CPU": 1}, log="other.log")
        assert "ran on host0" in after.wait_for("ran on")
        assert after.end(_PATIENCE_S)[0] == 0
