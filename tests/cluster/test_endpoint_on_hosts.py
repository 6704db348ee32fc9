"""An endpoint whose workers live on different hosts answers as one plain process, whatever happens between them.

The client is on another host. That its answers are right while nothing happens is in `test_ray_on_hosts.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from tests.support.hosted_endpoint import (
    DECODE,
    PREFILL,
    Client,
    Endpoint,
    Generate,
    Stream,
    plain_generate,
    start_endpoint,
)
from tests.support.ray_hosts import START_S, ray_on_hosts, wait_until
from tests.unit.serve.tiny_folder import TEXT

MAX_TOKENS, LONG_CHARS = 24, 9000
# Issue: recovery from the moment the link is cut.
RECOVERED_S = 30.0
HEADLESS_S = 15.0
# Where the replicas of a host listen.
_PORTS = """
import psutil
for process in psutil.process_iter(["cmdline"]):
    if "ServeReplica" in " ".join(process.info["cmdline"] or ()):
        found = process.net_connections("inet")
        print(*(connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN))
"""
# What each port of a host answers to a call of a replica without a token, with a wrong one, and with the right one.
_KNOCK = """
import json, sys
from pathlib import Path
import grpc

def code(port, token):
    with grpc.insecure_channel(f"{sys.argv[1]}:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        said = [("authorization", f"Bearer {token}")] if token else []
        try:
            call(b"", metadata=said, timeout=20)
        except grpc.RpcError as problem:
            return problem.code().name
        return "OK"

tokens = ["", "b" * 64, Path(sys.argv[2]).read_text().strip()]
print("codes", json.dumps([[code(port, token) for token in tokens] for port in sys.argv[3:]]))
"""
_ALIVE = "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """Prefill on the first worker host, decode on the second. A prompt is one iteration: nothing leaves earlier."""
    with ray_on_hosts({"CPU": 1, PREFILL: 1}, {"CPU": 1, DECODE: 1}) as cluster:
        yield start_endpoint(cluster, decoders=1, max_batch_tokens=16384)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Generate:
    return plain_generate(tmp_path_factory.mktemp("plain") / "tiny")


# Fast enough that what Ray says over the same link besides is little.
@pytest.mark.parametrize("megabits", [4, 8])
def test_the_measured_rate_of_a_transfer_is_what_the_link_carries(endpoint: Endpoint, megabits: float) -> None:
    (decode,) = endpoint.places["decode"]
    receiver = endpoint.host(decode)
    client = endpoint.client(endpoint.host(endpoint.places["prefill"][0]))
    receiver.cap(megabits)
    try:
        # Another beginning each time: nothing of it lies on the other host yet.
        traces = [client.trace(client.ask(f"{megabits} {n} {TEXT[:LONG_CHARS]}", 2)) for n in range(3)]
    finally:
        receiver.uncap()
    assert [(trace["route"], trace["recovered"]) for trace in traces] == [("split", False)] * 3
    assert [trace["kv_pages_early"] for trace in traces] == [0] * 3
    rates = [trace["kv_bytes"] * 8 / 1e6 / trace["transfer_s"] for trace in traces]
    print(f"cap {megabits} Mbit/s: {', '.join(f'{rate:.2f}' for rate in rates)}")
    for rate in rates:
        assert rate == pytest.approx(megabits, rel=0.1)


def test_a_replica_unpickles_nothing_from_whoever_has_not_the_token(endpoint: Endpoint) -> None:
    cluster, (decode,) = endpoint.cluster, endpoint.places["decode"]
    place = next(number for number, host in enumerate(cluster.made) if host.address == decode)
    code, ports = cluster.python(place, "-c", _PORTS, log="ports.log").end()
    assert code == 0, ports
    token = str(cluster.folder / "token")
    code, said = cluster.python(0, "-c", _KNOCK, decode, token, *ports.split(), log="knock.log").end()
    assert code == 0, said
    codes = json.loads(said.rpartition("codes ")[2])
    # It finds no request in nothing: the replica's own answer.
    own = [each for each in codes if each[2] in ("UNKNOWN", "INTERNAL")]
    assert own, codes
    assert all(each[:2] == ["UNAUTHENTICATED"] * 2 for each in own), codes
    assert not any("OK" in each for each in codes), codes


@pytest.mark.parametrize("how", ["cut", "killed"])
def test_a_host_with_a_decode_worker_is_lost_and_no_stream_is_broken(plain: Generate, how: str) -> None:
    both, one = {"CPU": 2, PREFILL: 1, DECODE: 1}, {"CPU": 1, DECODE: 1}
    with ray_on_hosts(both, one) as cluster:
        endpoint = start_endpoint(cluster, decoders=2)
        (door,) = endpoint.places["api"]
        lost = next(host for host in cluster.made[1:] if host.address != door)
        client = endpoint.client(endpoint.host(door))
        prompts = [TEXT[start : start + 600] for start in range(0, 6000, 1000)]
        answers = [client.start(prompt, 300) for prompt in prompts]
        wait_until(lambda: all(len(stream.arrivals_s) > 3 for stream, _ in answers), START_S, lambda: str(answers))
        lost.cut()
        cut_at_s = time.monotonic()
        if how == "killed":
            lost.crash()
        for stream, thread in answers:
            thread.join(START_S)
            assert not thread.is_alive(), stream
        recovered = [recovered_after(client, stream, cut_at_s) for stream, _ in answers]
        print(f"{how}: streams went on after {[None if s is None else round(s, 1) for s in recovered]} s")
        assert [stream.error for stream, _ in answers] == [None] * len(answers)
        assert [stream.text for stream, _ in answers] == [plain(prompt, 300) for prompt in prompts]
        assert any(recovered), "no stream was on the lost host"
        assert max(seconds for seconds in recovered if seconds is not None) < RECOVERED_S
        lost.restore()
        index = cluster.made.index(lost)
        cluster.worker(index, both if index == 1 else one, log="again.log")
        assert client.ask(prompts[0], MAX_TOKENS).text == plain(prompts[0], MAX_TOKENS)


def test_an_endpoint_answers_without_a_head_and_is_whole_again_when_the_head_is_back(
    plain: Generate,
) -> None:
    workers = {"CPU": 1, PREFILL: 1}, {"CPU": 1, DECODE: 1}
    with ray_on_hosts(*workers, lasting=True) as cluster:
        endpoint = start_endpoint(cluster, decoders=1)
        assert cluster.made[0].address not in {where for places in endpoint.places.values() for where in places}
        client, prompt = endpoint.client(endpoint.host(endpoint.places["api"][0])), TEXT[500:1500]
        stream, thread = client.start(prompt, 300)
        wait_until(lambda: len(stream.arrivals_s) > 3, START_S, lambda: str(stream))
        cluster.made[0].crash()
        thread.join(START_S)
        assert (stream.error, stream.text) == (None, plain(prompt, 300))
        began_s = time.monotonic()
        # Serve's own controller died with the head; what it left alone goes on for longer than its every period.
        while time.monotonic() < began_s + HEADLESS_S:
            found = client.ask(TEXT[2000:3000], MAX_TOKENS)
            assert (found.error, found.text) == (None, plain(TEXT[2000:3000], MAX_TOKENS))
        cluster.head("reborn.log")
        # Its proxy is a new one, which the new controller made and told of the old workers.
        door = endpoint.client(cluster.made[0])
        wait_until(lambda: door.ask(prompt, MAX_TOKENS).finish is not None, START_S, lambda: "no door on the head")
        assert door.ask(prompt, MAX_TOKENS).text == plain(prompt, MAX_TOKENS)
        nodes = cluster.python(0, "-c", _ALIVE, log="alive.log")
        assert nodes.end()[1].split()[-1] == "3"


def recovered_after(client: Client, stream: Stream, cut_at_s: float) -> float | None:
    """Seconds from the cut until a stream's next piece; None: its worker was elsewhere."""
    if not client.trace(stream)["recovered"]:
        return None
    return next(at_s for at_s in stream.arrivals_s if at_s > cut_at_s + 1) - cut_at_s
