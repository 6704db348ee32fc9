"""What an endpoint counts is what happened, and what a dashboard asks for is there once there was a request."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.serve.in_process import Served

from farspan.engine.draft import DraftUse
from farspan.kv.host_index import HostUse
from farspan.serve.messages import WorkerInfo
from farspan.serve.metrics import Gaps, Metrics
from farspan.serve.trace import Arrivals

DASHBOARD = Path(__file__).resolve().parents[3] / "infra" / "monitoring" / "dashboards" / "serving.json"
TEXT = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 5, "ignore_eos": True}


def test_every_number_of_the_dashboard_is_exported_by_an_endpoint_that_answered(tiny_folder):
    served = Served(tiny_folder, engine={"host_cache_bytes": 1 << 20})
    try:
        moved = served.post("/v1/completions", TEXT, headers={"x-request-id": "moved"})
        assert moved.status_code == 200
        page = served.get("/metrics").text
        trace = served.get("/v1/requests/moved/trace").json()
    finally:
        served.stop()
    told = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if line[0] != "#"}
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert set(re.findall(r"\bfarspan_\w+", asked)) - {name.partition("{")[0] for name in told} == set()
    assert trace["kv_bytes"] > 0
    assert told[f'farspan_transfer_bytes_total{{transport="{trace["transport"]}"}}'] == trace["kv_bytes"]
    assert told['farspan_transfer_seconds_count{transport="memory"}'] == 1
    assert told['farspan_transfer_seconds_sum{transport="memory"}'] == pytest.approx(trace["transfer_s"])
    assert told["farspan_transfer_room_seconds_count"] == 1
    assert told["farspan_transfer_room_seconds_sum"] == trace["page_wait_s"] == 0


def test_guessed_tokens_are_counted_once_however_often_workers_are_asked_and_whoever_is_gone():
    metrics = Metrics()
    first = WorkerInfo("decode", 1, "layout", 97, 512, 400, 9, 9, 0, 0, 0, worker="a", drafted=DraftUse(10, 4))
    second = replace(first, worker="b", drafted=DraftUse(3, 0))

    def counted(*infos: WorkerInfo) -> tuple[float, float]:
        samples = [sample for family in metrics.families(infos) for sample in family.samples]
        found = {s.labels["kind"]: s.value for s in samples if s.name == "farspan_draft_tokens_total"}
        return found["proposed"], found["accepted"]

    assert counted(first, second) == (13, 4)
    first = replace(first, drafted=DraftUse(16, 9))
    assert counted(first, second) == counted(second, first) == (19, 9)
    # The answer to a question that was asked before: nothing is counted twice, nor taken back.
    assert counted(replace(first, drafted=DraftUse(11, 4))) == counted(first) == (19, 9)
    # One that does not answer once is not counted anew, one in the place of another is counted from its beginning.
    assert counted(second) == counted(first) == (19, 9)
    assert counted(replace(first, pid=2, drafted=DraftUse(5, 5)), second) == (24, 14)


def test_gaps_are_counted_where_they_belong_and_their_sum_is_the_time_from_first_to_last():
    registry, one, other = CollectorRegistry(), Arrivals(), Arrivals()
    gaps = Gaps("gaps", "Between tokens.", registry)
    # Two tokens come together after 16 ms; then 20 ms, 3 s.
    for count, at_s in ((1, 1.0), (2, 1.016), (1, 1.036), (1, 4.036)):
        one.add(count, at_s)
    other.add(1, 7.0)
    gaps.add(one)
    gaps.add(other)
    counted = {at: registry.get_sample_value("gaps_bucket", {"le": at}) for at in ("0.001", "0.01", "0.025", "2.5")}
    assert counted == {"0.001": 0, "0.01": 2, "0.025": 3, "2.5": 3}
    assert registry.get_sample_value("gaps_bucket", {"le": "+Inf"}) == registry.get_sample_value("gaps_count") == 4
    assert registry.get_sample_value("gaps_sum") == pytest.approx(3.036)


def test_what_workers_hold_is_told_of_all_that_are_there_and_of_none_that_is_gone():
    metrics = Metrics()
    worker = WorkerInfo("decode", 1, "layout", 97, 512, 400, 100, 60, 5, 2, 0, host=HostUse(7, 0, 1, 0, lost=True))
    workers = [replace(worker, role="prefill"), worker, replace(worker, num_free=30, num_requests=1)]

    def told(infos: list[WorkerInfo]) -> dict[tuple[str, ...], float]:
        samples = [sample for family in metrics.families(infos) for sample in family.samples]
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    both = told(workers)
    assert both["farspan_kv_pages", "decode", "all"] == 200
    assert both["farspan_kv_pages", "decode", "free"] == 90
    assert both["farspan_kv_pages", "prefill", "quarantined"] == 5
    assert both["farspan_worker_requests", "decode"] == 3
    assert [both["farspan_host_cache_pages", "decode", what] for what in ("kept", "corrupt", "lost")] == [14, 2, 2]
    one = told(workers[:1])
    assert one["farspan_kv_pages", "prefill", "all"] == 100
    assert not [name for name in one if "decode" in name]
    assert not [name for name in told([]) if "prefill" in name]
