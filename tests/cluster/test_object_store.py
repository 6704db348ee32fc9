"""An answer whose pages travelled by Ray's object store equals the colocated one, and nothing stays in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import ray
from tests.unit.serve.tiny_folder import TEXT, write_tiny_model

from farspan.config.schema import EngineConfig, ServeConfig, TransferConfig
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.ticket import SourceAddress
from farspan.kv.transports.base import ReadStatus
from farspan.kv.transports.object_store import ObjectTransport
from farspan.serve.agent import NAMESPACE
from farspan.serve.app import Running, run_app
from farspan.serve.object_store import RayExchange
from farspan.serve.port import free_port

KEY, MIB = "sk-test", 1 << 20
LAYOUT = KvLayout.uniform(
    model="m", num_layers=2, num_kv_heads=1, k_head_dim=8, v_head_dim=8, dtype="float32", page_tokens=16
)


@contextmanager
def served(folder: Path, transfer: TransferConfig) -> Iterator[Running]:
    key_file = folder.with_name("keys")
    key_file.touch(mode=0o600)
    key_file.write_text(f"{KEY}\n")
    config = ServeConfig(
        model=str(folder),
        port=free_port(),
        api_key_file=str(key_file),
        engine=EngineConfig(dtype="float64", kv_bytes=64 * 1024 * 1024, max_batch_tokens=512),
        transfer=transfer,
        start_timeout_s=240,
    )
    with run_app(config) as running:
        yield running


def answers(running: Running) -> list[tuple[str, dict]]:
    """(text, trace) of a short prompt, one in several parts, and one that is sampled."""
    client = openai.OpenAI(base_url=running.url, api_key=KEY, timeout=240, max_retries=0)
    told = []
    for num_chars, temperature in ((40, 0.0), (9000, 0.0), (300, 0.8)):
        answer = client.completions.create(
            model="tiny", prompt=TEXT[100 : 100 + num_chars], max_tokens=24, temperature=temperature, seed=7
        )
        told.append((answer.choices[0].text, get(running, f"requests/{answer.id}/trace").json()))
    return told


def get(running: Running, path: str) -> httpx.Response:
    found = httpx.get(f"{running.url}/{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert found.status_code == 200, found.text
    return found


def store_bytes() -> float:
    """What lies in the object store, as Ray's nodes reported it last."""
    name = "object_store_memory"
    return ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0)


def is_as_empty_as(num_bytes: float) -> bool:
    """Whether the store has no more than that in it. Reports are old: an object is seen to come, then to go."""
    marker = ray.put(bytes(MIB))
    seen = wait_until(lambda: store_bytes() >= num_bytes + MIB)
    del marker
    return seen and wait_until(lambda: store_bytes() <= num_bytes)


def wait_until(holds: Callable[[], bool]) -> bool:
    ends_s = time.monotonic() + 60
    while not holds() and time.monotonic() < ends_s:
        time.sleep(0.2)
    return holds()


def counted(metrics: str, name: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith(f'{name}{{transport="object_store"}}')]
    return float(line.rpartition(" ")[2])


@pytest.mark.long
def test_pages_by_the_object_store_give_the_colocated_answer_and_leave_the_store_empty(ray_cluster, tmp_path):
    write_tiny_model(tmp_path / "tiny")
    split = TransferConfig(deadline_s=30, lease_s=50, split="always", transport="object_store")
    with served(tmp_path / "tiny", split) as running:
        assert running.transport == "object_store (transfer.transport asks for it)"
        before = store_bytes()
        travelled = answers(running)
        for _, trace in travelled:
            assert (trace["recovered"], trace["transport"], trace["route"]) == (False, "object_store", "split")
            assert trace["kv_bytes"] > 0
        assert travelled[1][1]["kv_pages_early"] > 0
        assert is_as_empty_as(before)
        metrics = get(running, "../metrics").text
        moved = sum(trace["kv_bytes"] for _, trace in travelled)
        assert counted(metrics, "farspan_transfer_bytes_total") == moved
        assert counted(metrics, "farspan_transfer_seconds_count") == 3
    colocated = replace(split, transport="auto", colocate_below_tokens=100_000)
    with served(tmp_path / "tiny", colocated) as running:
        alone = answers(running)
    assert [trace["kv_bytes"] for _, trace in alone] == [0, 0, 0]
    assert [text for text, _ in travelled] == [text for text, _ in alone]
    assert all(len(set(text)) > 5 for text, _ in travelled), "vacuous answers"


def test_a_lost_desk_comes_again_and_a_lost_process_ends_its_reads_at_once(ray_cluster):
    source, address = start_source(LAYOUT)
    receiver = PagePool(LAYOUT, 2 * LAYOUT.page_bytes)
    transport = ObjectTransport(receiver, RayExchange, deadline_s=20.0)

    def read() -> ReadStatus:
        reading = transport.read_pages(address, [1], [0])
        assert wait_until(lambda: reading.status() is not ReadStatus.PENDING)
        return reading.status()

    def desks() -> int:
        known = ray.util.list_named_actors(all_namespaces=True)
        return sum(actor["name"].endswith(address.incarnation) for actor in known)

    try:
        assert read() is ReadStatus.DONE
        assert (receiver.storage_PB[0] == 7).all()
        assert not receiver.storage_PB[1].any()
        ray.kill(ray.get_actor(f"farspan-pages-{address.incarnation}", namespace=NAMESPACE), no_restart=False)
        assert wait_until(lambda: read() is ReadStatus.DONE)
        ray.kill(source)
        started_s = time.monotonic()
        assert read() is ReadStatus.FAILED
        assert time.monotonic() - started_s < 15, "it waited for its deadline"
        assert wait_until(lambda: desks() == 0)
    finally:
        transport.close()
        ray.kill(source)


def start_source(layout: KvLayout) -> tuple[ray.actor.ActorHandle, SourceAddress]:
    """A process with two pages full of sevens, and where they are."""

    # Here: Ray's workers do not find the modules of tests.
    class Source:
        def __init__(self) -> None:
            pool = PagePool(layout, 2 * layout.page_bytes)
            pool.storage_PB.fill_(7)
            self._transport = ObjectTransport(pool, RayExchange, deadline_s=20.0)

        def address(self) -> SourceAddress:
            return self._transport.address()

    source = ray.remote(Source).options(num_cpus=0).remote()
    return source, ray.get(source.address.remote(), timeout=240)
