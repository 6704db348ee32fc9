"""What is remembered of a request is right, and stays small however long its answers are."""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest

from farspan.serve.trace import Arrivals, RequestTrace, TraceBook


def test_the_trace_of_a_long_answer_takes_no_more_room_than_that_of_a_short_one():
    trace = RequestTrace("r", 1)
    for _ in range(500):
        trace.token(1)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50_000):
            trace.token(3)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert trace.report()["output_tokens"] == 150_500


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale_s", [0.002, 0.05, 3.0])
def test_percentiles_of_the_gaps_are_those_of_all_of_them_to_a_twentieth(seed: int, scale_s: float):
    chance = random.Random(seed)
    arrivals, times, now_s = Arrivals(), [], 0.0
    for _ in range(chance.randint(2, 3000)):
        now_s += scale_s * chance.lognormvariate(0, 1)
        count = chance.choice([1, 1, 1, 1, 2])
        arrivals.add(count, now_s)
        before_s = times[-1] if times else now_s
        times += [before_s + (now_s - before_s) * (place + 1) / count for place in range(count)]
    gaps = sorted(b - a for a, b in pairwise(times))
    assert (arrivals.count, arrivals.first_s) == (len(times), times[0])
    assert arrivals.last_s == pytest.approx(times[-1])
    for percent in (50, 90, 99):
        wanted = gaps[len(gaps) * percent // 100]
        assert arrivals.percentile_s(percent) == pytest.approx(wanted, rel=0.05, abs=1e-4)
    assert len(arrivals.gaps) < 200


def test_one_token_has_a_time_and_no_gaps_and_tokens_that_come_together_share_the_one_before_them():
    arrivals = Arrivals()
    arrivals.add(0, 0.5)
    assert (arrivals.count, arrivals.first_s, arrivals.percentile_s(50)) == (0, None, None)
    arrivals.add(1, 0.5)
    assert (arrivals.count, arrivals.first_s, arrivals.last_s, arrivals.percentile_s(99)) == (1, 0.5, 0.5, None)
    together = Arrivals()
    together.add(4, 2.0)
    assert [together.percentile_s(percent) for percent in (50, 90, 99)] == [0.0, 0.0, 0.0]
    together.add(4, 3.0)
    assert [together.percentile_s(percent) for percent in (50, 90, 99)] == [pytest.approx(0.25, rel=0.05)] * 3
    assert together.span_s == 1.0


def test_the_digest_of_a_trace_is_that_of_the_pages_that_were_offered_and_of_nothing_else(served):
    def digest_of(prompt: str) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        assert served.post("/v1/completions", body, headers={"x-request-id": "mine"}).status_code == 200
        trace = served.get("/v1/requests/mine/trace").json()
        assert trace["kv_bytes"] > 0
        assert not trace["recovered"]
        return trace["kv_digest"]

    one, other = digest_of("import threading as t"), digest_of("import threading as u")
    tickets = [prefilled.ticket for prefilled in served.workers.prefilled[-2:]]
    assert [ticket.digest for ticket in tickets] == [one, other]
    assert one != other
    assert len(one) == len(other) == 16
    (first, *rest), *_ = (ticket.pages for ticket in tickets)
    moved = replace(first, page=first.page + 1, epoch=first.epoch + 1)
    changed = replace(first, digest=first.digest ^ 1)
    assert replace(tickets[0], pages=(moved, *rest)).digest == one
    assert (
        len({one, *(replace(tickets[0], pages=pages).digest for pages in ((changed, *rest), rest, (*rest, first)))})
        == 4
    )


def test_requests_of_many_answers_are_forgotten_sooner():
    book = TraceBook()
    for number in range(40):
        trace = book.open(f"r{number}", 1)
        for choice in range(128):
            trace.choice(choice)
    kept = [number for number in range(40) if book.find(f"r{number}") is not None]
    # 31 times 128 are less than 4000; how many the last one has is not known when it is opened.
    assert kept == list(range(8, 40))


def test_answers_are_counted_as_long_as_their_requests_are_kept():
    """Equals a count of all that are kept, however often ids come again and answers late."""
    chance, book, opened = random.Random(4), TraceBook(), []
    for _ in range(4000):
        if opened and chance.random() < 0.5:
            # Also of one that is forgotten, or was opened again.
            chance.choice(opened).choice(1)
        else:
            opened.append(book.open(f"r{chance.randrange(1500)}", 1, chance.choice(("a", "b"))))
        assert book._tally.count == sum(1 + len(trace.others) for trace in book._traces.values())
    assert len(book._traces) == 1000


@pytest.mark.parametrize("n", [1, 2])
def test_what_a_request_waited_for_its_turn_is_told_apart_from_what_its_prompt_took(served, n):
    body = {"model": "tiny", "prompt": "while True: pass", "max_tokens": 2, "ignore_eos": True, "n": n}
    host, pool = served.workers.hosts[0], served.workers.engines[0].pool

    async def run() -> float:
        taken = await host._call(lambda: pool.alloc(pool.num_free))
        async with served.http() as http:
            asking = asyncio.ensure_future(http.post("/v1/completions", json=body, headers={"x-request-id": f"n{n}"}))
            while (await host.info()).num_requests < n:
                await asyncio.sleep(0.001)
            waits_s = time.monotonic()
            await asyncio.sleep(0.2)
            waited_s = time.monotonic() - waits_s
            await host._call(lambda: pool.free(taken))
            assert (await asking).status_code == 200
        return waited_s

    waited_s = asyncio.run(run())
    trace = served.get(f"/v1/requests/n{n}/trace").json()
    for one in (trace, *trace.get("other_choices", [])):
        assert not one["recovered"]
        assert waited_s <= one["queue_s"] < one["queue_s"] + one["prefill_s"] <= one["time_to_first_token_s"]


def test_a_request_that_waits_for_nobody_has_waited_for_little_of_its_time(served):
    body = {"model": "tiny", "prompt": "x" * 4000, "max_tokens": 2, "ignore_eos": True}
    assert served.post("/v1/completions", body, headers={"x-request-id": "alone"}).status_code == 200
    trace = served.get("/v1/requests/alone/trace").json()
    assert 0 < trace["queue_s"] < trace["time_to_first_token_s"]
    assert trace["prefill_s"] > 0


def test_the_time_of_a_trace_and_of_its_further_answers_begins_with_the_arrival():
    trace = TraceBook().open("r", 1, started_s=100.0)
    assert (trace.started_s, trace.choice(1).started_s) == (100.0, 100.0)
