"""Ray on hosts of their own: an endpoint answers as one process does, the token lets nobody else in, and a silent
partition is noticed and mended in time.

The nodes get the switches of `farspan.cluster.environment`, as the rendered files give them.
"""

import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.support.hosted_endpoint import DECODE, PREFILL, Endpoint, Generate, plain_generate, start_endpoint
from tests.support.ray_hosts import START_S, TOKEN, Process, RayHosts, ray_on_hosts
from tests.unit.serve.tiny_folder import TEXT

ONE = {"CPU": 1}
FIRST, SECOND = {"CPU": 2, PREFILL: 1}, {"CPU": 2, DECODE: 1}
MAX_TOKENS, LONG_CHARS, SHORT_CHARS = 24, 9000, 40
# Issue: a partition is over in half a minute, where Ray's defaults take more than one and lose the tasks.
_NOTICED_S = 30.0
_PLAINTEXT_S = 40.0
# Two tasks on the other host; both must end, though their host is cut off when the first has begun.
_DRIVER = """
import os, sys, time
import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, resources={"farspan-prefill": 1}, max_retries=10)
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
    while alive() == 3 and time.monotonic() - begin < 120:
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


def start_driver(cluster: RayHosts, *words: str, log: str, **changed: str) -> Process:
    return cluster.python(0, "-c", _DRIVER, cluster.address, *words, log=log, **changed)


def count(cluster: RayHosts, log: str) -> list[str]:
    """Let the lasting actor count once, from its own host; gives its count and its process."""
    code, text = cluster.python(1, "-c", _COUNTER, cluster.address, log=log).end()
    assert code == 0, text
    return text.partition("counted ")[2].split()[:2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with ray_on_hosts(FIRST, SECOND) as found:
        yield found


@pytest.fixture(scope="module")
def endpoint(cluster: RayHosts) -> Endpoint:
    """Prefill on the first worker host, decode on the second; it ends with the cluster."""
    return start_endpoint(cluster, decoders=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Generate:
    return plain_generate(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.mark.soak
def test_a_driver_on_one_host_runs_a_task_on_the_other(cluster: RayHosts) -> None:
    driver = start_driver(cluster, log="driver.log")
    assert "ran on host1" in driver.wait_for("ran on")
    assert driver.end()[0] == 0


@pytest.mark.long
@pytest.mark.parametrize("token", ["b" * 64, pytest.param(None, marks=pytest.mark.soak)], ids=["wrong", "none"])
def test_a_driver_with_a_wrong_token_or_none_is_refused_and_told_why(token: str | None, cluster: RayHosts) -> None:
    stranger = cluster.folder / "stranger"
    stranger.unlink(missing_ok=True)
    if token is not None:
        stranger.write_text(token, encoding="ascii")
        stranger.chmod(0o600)
    # Who is refused asks again every second, 20 times if nobody says otherwise.
    changed = {"RAY_AUTH_TOKEN_PATH": str(stranger), "RAY_NUM_REDIS_GET_RETRIES": "2"}
    code, text = start_driver(cluster, log="stranger.log", **changed).end()
    assert code != 0
    assert "AuthenticationError" in text
    assert "ran on" not in text
    assert TOKEN not in text


@pytest.mark.long
def test_a_cut_host_is_noticed_in_time_and_its_task_runs_again(cluster: RayHosts) -> None:
    driver = start_driver(cluster, "cut", log="cut.log")
    driver.wait_for("cut now")
    cluster.made[1].cut()
    try:
        text = driver.wait_for("noticed after", 150)
    finally:
        cluster.made[1].restore()
    noticed_s = float(text.partition("noticed after ")[2].split()[0])
    assert noticed_s < _NOTICED_S
    # The node that was taken for dead ends itself; one like it takes its place.
    cluster.worker(1, FIRST, log="again.log")
    assert "ran again on host1" in driver.wait_for("ran again on")
    assert driver.end()[0] == 0


@pytest.mark.soak
@pytest.mark.parametrize(("num_chars", "route"), [(LONG_CHARS, "split"), (SHORT_CHARS, "colocated")])
def test_a_prompt_computed_on_one_host_is_answered_on_another_as_by_generate(
    endpoint: Endpoint, plain: Generate, num_chars: int, route: str
) -> None:
    (prefill,), (decode,) = endpoint.places["prefill"], endpoint.places["decode"]
    assert prefill != decode
    receiver, prompt = endpoint.host(decode), TEXT[100 : 100 + num_chars]
    client, before = endpoint.client(endpoint.host(prefill)), receiver.received_bytes()
    found = client.ask(prompt, MAX_TOKENS)
    received = receiver.received_bytes() - before
    assert found.error is None
    assert found.text == plain(prompt, MAX_TOKENS)
    trace = client.trace(found)
    assert (trace["route"], trace["recovered"]) == (route, False)
    if route == "split":
        # Over the cable, and not through memory that two processes of one machine could share.
        assert trace["transport"] == "nixl"
        assert received > trace["kv_bytes"] > 1 << 20
    # Every host with a worker is a door, and so is the head.
    for host in endpoint.cluster.made:
        assert endpoint.client(host).ask(prompt, MAX_TOKENS).text == found.text


@pytest.mark.soak
def test_with_our_certificates_hosts_trust_each_other_and_a_plaintext_driver_gets_nowhere() -> None:
    with ray_on_hosts({**ONE, PREFILL: 1}, tls=True) as secure:
        driver = start_driver(secure, log="secure.log")
        assert "ran on host1" in driver.wait_for("ran on")
        assert driver.end()[0] == 0
        # It has the token, and still nobody understands it. Ray tries for longer than we watch.
        plain = start_driver(secure, log="plain.log", RAY_USE_TLS="0")
        with suppress(subprocess.TimeoutExpired):
            assert plain.popen.wait(_PLAINTEXT_S) != 0
        assert "ran on" not in plain.text
        plain.popen.kill()
        plain.popen.wait(START_S)


@pytest.mark.soak
def test_a_head_that_crashes_comes_back_with_its_state_on_disk_and_an_actor_never_notices() -> None:
    with ray_on_hosts(ONE, lasting=True) as found:
        assert count(found, "first.log")[0] == "1"
        before = count(found, "second.log")
        found.made[0].crash()
        found.head("reborn.log")
        after = count(found, "third.log")
        # The same process went on counting: it was not started again.
        assert (before, after) == (["2", before[1]], ["3", before[1]])
