"""Requests go where they cost least, over real engines: the text stays transformers', whoever is chosen or lost."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.unit.serve.placed import GuidedServed
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import ObjectivesConfig, TransferConfig
from farspan.engine.request import SamplingParams
from farspan.errors import ClusterError, EngineError, RequestError, TransferError
from farspan.serve.along import Along
from farspan.serve.faults import is_past
from farspan.serve.messages import Failed, GenerationRequest
from farspan.serve.metrics import rendered
from farspan.serve.policy import Place, Route
from farspan.serve.quotas import Orders, Quota
from farspan.serve.readiness import Readiness
from farspan.serve.ways import GuidedWays

PROMPT = TEXT[200:900]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def endpoint(tiny_folder) -> Iterator[GuidedServed]:
    made = GuidedServed(tiny_folder)
    yield made
    made.stop()


@pytest.fixture
def guided(endpoint) -> GuidedServed:
    """The endpoint, nothing learned, nobody lost."""
    endpoint.workers.gone.clear()
    endpoint.workers.die_in = None
    endpoint.workers.resumed.clear()
    endpoint.renew(replace(endpoint.config, transfer=TransferConfig(), objectives=ObjectivesConfig()))
    return endpoint


@pytest.fixture(scope="module")
def expected(oracle) -> str:
    model, tokenizer = oracle
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
    )
    tokens = out[0, ids.shape[1] :].tolist()
    assert len(set(tokens)) >= 6
    return tokenizer.decode(tokens, skip_special_tokens=True)


def ask(guided: GuidedServed, name: str, prompt: str = PROMPT, **more) -> tuple[str, dict]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **more}
    answer = guided.post("/v1/completions", body, headers={"x-request-id": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], guided.get(f"/v1/requests/{name}/trace").json()


def test_the_trace_says_who_was_chosen_and_why(guided, expected):
    text, trace = ask(guided, "one")
    assert text == expected
    assert (trace["route"], trace["prefill_worker"]) == ("colocated", None)
    assert trace["decode_worker"] in ("p", "d", "e")
    assert "s to the first token" in trace["route_reason"]
    assert trace["predicted_first_token_s"] > 0
    assert trace["predicted_token_s"] > 0


def test_the_next_request_of_a_beginning_goes_to_the_worker_that_has_it_and_finds_what_was_promised(guided):
    prompt = TEXT[3000:4500]
    _, first = ask(guided, "first", prompt)
    for number in range(4):
        _, again = ask(guided, f"again{number}", prompt + " and more" * number)
        assert again["decode_worker"] == first["decode_worker"]
        assert f"{again['cached_tokens'] // 4 * 4} prompt tokens found" in again["route_reason"]
        assert again["cached_tokens"] >= 0.9 * first["prompt_tokens"]


def test_where_roles_are_kept_apart_pages_travel_and_the_text_is_the_same(guided, expected):
    guided.renew(replace(guided.config, transfer=TransferConfig(split="always")))
    text, trace = ask(guided, "apart")
    assert text == expected
    assert (trace["route"], trace["prefill_worker"], trace["transport"]) == ("split", "p", "memory")
    assert trace["decode_worker"] in ("d", "e")


@pytest.mark.parametrize("problem", [ClusterError("it was silent"), EngineError("the decode worker stopped")])
def test_an_answer_whose_worker_is_lost_goes_on_with_another_that_was_not(guided, expected, problem):
    guided.workers.die_in, guided.workers.dies_of = 5, problem
    text, trace = ask(guided, "lost")
    assert text == expected
    assert len(trace["recoveries"]) == 1
    (first, _), (second, given) = guided.workers.resumed[-2:]
    assert first == trace["decode_worker"]
    assert second not in (None, first)
    assert given < 5
    # Nobody goes there any more.
    assert ask(guided, "after")[1]["decode_worker"] != first


def test_a_prompt_is_computed_apart_again_and_its_pages_go_to_whoever_answers_next(guided, expected):
    guided.renew(replace(guided.config, transfer=TransferConfig(split="always")))
    guided.workers.die_in = 5
    text, trace = ask(guided, "lost-apart")
    assert text == expected
    assert len(trace["recoveries"]) == 1
    (first, _), (second, given) = guided.workers.resumed[-2:]
    assert second not in (None, first)
    assert 0 < given <= 5
    assert guided.workers.fetched[-2:] == [True, True]


def test_several_answers_to_a_prompt_go_one_way_and_compute_it_once(guided):
    prompt = TEXT[5000:6000]
    answer = guided.post(
        "/v1/completions",
        {"model": "tiny", "prompt": prompt, "max_tokens": 4, "n": 3, "seed": 1, "ignore_eos": True},
        headers={"x-request-id": "three"},
    )
    assert len(answer.json()["choices"]) == 3
    trace = guided.get("/v1/requests/three/trace").json()
    others = trace["other_choices"]
    assert {other["decode_worker"] for other in others} == {trace["decode_worker"]}
    assert sum(one["cached_tokens"] > 0 for one in (trace, *others)) == 2


def test_who_would_be_too_late_gets_429_and_is_told_when_to_come_again(guided):
    for _ in range(30):
        guided.ways.guide.times.learn_prefill("k", 100, 50, 40.0)
    body = {"model": "tiny", "prompt": TEXT[20_000:20_700], "max_tokens": 2, "deadline_s": 5}
    refused = guided.post("/v1/completions", body)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    after_s = int(refused.headers["retry-after"])
    # 200 tokens and more at 0.4 s each, five of them are allowed.
    assert 50 < after_s <= 300
    assert f"try again in {after_s} s" in error["message"]
    assert b'farspan_requests_total{outcome="limited"} 1.0' in rendered(guided.api._metrics.families([]))
    # Without a deadline there is nothing to be late for.
    assert guided.post("/v1/completions", {**body, "deadline_s": None}).status_code == 200


def test_an_endpoint_that_takes_on_no_longer_waits_says_so_to_everybody(guided):
    guided.renew(replace(guided.config, objectives=ObjectivesConfig(max_wait_s=3.0)))
    for _ in range(30):
        guided.ways.guide.times.learn_prefill("k", 100, 50, 40.0)
    refused = guided.post("/v1/completions", {"model": "tiny", "prompt": TEXT[21_000:21_700], "max_tokens": 2})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")


def test_a_first_request_waits_until_all_workers_were_asked_and_is_given_to_none_because_it_was_quicker(guided):
    class Late(type(guided.workers)):
        """The worker for prompts answers when the request is already there."""

        async def reports(self, orders, hear):
            for name in "de":
                hear(await self.report(name, Orders()), time.monotonic())
            await asked.wait()
            hear(await self.report("p", Orders()), time.monotonic())
            return set()

    async def first() -> tuple[bool, bool, Route]:
        ways.listen()
        while not ways.guide.workers:
            await asyncio.sleep(0)
        before = ways.asleep
        waiting = asyncio.ensure_future(ways.ready(None))
        await asyncio.sleep(0)
        asked.set()
        await waiting
        return before, ways.asleep, ways.way(GenerationRequest("r", (1,) * 40, SamplingParams(max_tokens=4)))

    asked, workers = asyncio.Event(), guided.workers
    ways = GuidedWays(workers, replace(guided.config, transfer=TransferConfig(split="always")))
    workers.__class__ = Late
    try:
        before, after, route = asyncio.run(first())
    finally:
        workers.__class__ = Late.__mro__[1]
    assert (before, after) == (True, False)
    assert (route.split, route.prefill.worker) == (True, "p")


def test_many_who_waited_for_a_worker_know_all_that_came_with_it_by_one_question(guided):
    class Woken(type(guided.workers)):
        """Nobody is there until one is called for; then all are."""

        async def reports(self, orders, hear):
            rounds.append(set(orders))
            return await super().reports(orders, hear) if woken else set()

        async def wake(self, timeout_s):
            woken.append(True)
            return await super().wake(timeout_s)

    async def many() -> None:
        await asyncio.gather(*(ways.ready(None) for _ in range(30)))

    rounds, woken, workers = [], [], guided.workers
    ways = GuidedWays(workers, guided.config)
    workers.__class__ = Woken
    try:
        asyncio.run(many())
    finally:
        workers.__class__ = Woken.__mro__[1]
    assert {load.worker for load in ways.guide.workers} == {"p", "d", "e"}
    # The first finds nobody; the hearer's next one may come in between.
    assert len(rounds) <= 4


def test_a_worker_that_took_long_to_come_is_there_all_the_same(guided, monkeypatch):
    monkeypatch.setattr("farspan.serve.guide._STALE_S", 0.2)

    class Slow(type(guided.workers)):
        """It takes longer to come than what is heard of a worker counts."""

        async def reports(self, orders, hear):
            return set()

        async def wake(self, timeout_s):
            await asyncio.sleep(0.5)
            return await super().wake(timeout_s)

    workers, ways = guided.workers, GuidedWays(guided.workers, guided.config)
    workers.__class__ = Slow
    try:
        asyncio.run(ways.ready(None))
        assert {load.worker for load in ways.guide.workers} == {"d"}
    finally:
        workers.__class__ = Slow.__mro__[1]


def test_what_a_timer_ended_a_little_early_is_past_its_deadline():
    now_s = time.time()
    assert [is_past(at_s) for at_s in (now_s + 0.005, now_s - 1, now_s + 60, None)] == [True, True, False, False]


def test_whoever_hears_that_an_endpoint_is_ready_is_sent_to_all_of_its_workers(guided):
    guided.ways.guide.heard(asyncio.run(guided.workers.report("p", Orders())), time.monotonic())
    guided.api._readiness = Readiness(guided.api._met)
    assert guided.get("/ready").status_code == 200
    assert {load.worker for load in guided.ways.guide.workers} == {"p", "d", "e"}


def test_an_endpoint_without_workers_wakes_one_or_says_503(guided):
    class Asleep(type(guided.workers)):
        """No worker is there; one comes when it is called for, if at all."""

        comes = True

        async def reports(self, orders, hear):
            return set()

        async def wake(self, timeout_s):
            return await super().wake(timeout_s) if self.comes else []

    workers = guided.workers
    workers.__class__ = Asleep
    try:
        assert ask(guided, "woken")[1]["decode_worker"] == "d"
        Asleep.comes = False
        guided.renew(guided.config)
        refused = guided.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["retry-after"] == "5"
    finally:
        workers.__class__ = Asleep.__mro__[1]


def test_after_answers_the_guide_knows_how_long_they_take(guided):
    for number in range(12):
        ask(guided, f"r{number}", TEXT[number * 137 : number * 137 + 400], ignore_eos=True)
    # Predicted from what was seen: before, it was wrong by any factor. The machine does other things too, and stops
    # some requests for them, but not most.
    ratios = []
    for number in range(7):
        _, trace = ask(guided, f"known{number}", TEXT[9000 + number * 141 : 9400 + number * 141], ignore_eos=True)
        ratios.append(trace["time_to_first_token_s"] / trace["predicted_first_token_s"])
    assert 0.1 < statistics.median(ratios) < 10
    signals = guided.ways.guide.signals(0)
    assert signals.answer_tokens_s > 0
    assert signals.prompt_tokens_s > 0
    assert signals.prefill_rate > 0


def test_two_workers_turn_round_their_roles_when_the_load_does_and_answer_the_same(guided, expected):
    """Over real engine hosts: mostly prompts, then mostly answers."""
    guide = guided.ways.guide

    def quotas() -> dict[str, Quota]:
        return {name: orders.quota for name, orders in guide.orders().items() if orders.quota is not None}

    for number in range(4):
        ask(guided, f"prompts{number}", TEXT[7000 + number * 700 : 8500 + number * 700], max_tokens=1)
    mostly_prompts = guide.demand()
    assert sum(quota.prefill_tokens is None for quota in quotas().values()) >= 1
    for number in range(3):
        ask(guided, f"answers{number}", "x", max_tokens=100, ignore_eos=True)
    assert guide.demand().share < mostly_prompts.share
    assert ask(guided, "at last")[0] == expected


def test_failures_that_another_worker_cannot_mend_are_not_blamed_on_this_one(guided):
    along = Along(guided.workers, guided.ways.guide, Route(False, "", decode=Place("decode", "d")))
    along._lose(Place("decode", "d"), Failed(TransferError("r", "the connection broke")))
    along._lose(Place("decode", "d"), Failed(RequestError("r", "the prompt is too long")))
    assert along._lost == set()
    along._lose(Place("decode", "d"), Failed(ClusterError("gone")))
    along._lose(Place("decode", "e"), Failed(EngineError("another rank is lost")))
    assert along._lost == {"d", "e"}
