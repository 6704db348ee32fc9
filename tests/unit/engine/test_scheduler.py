"""The next iteration, as plain values."""

from __future__ import annotations

from dataclasses import replace

from farspan.engine.fairness import Claim, Service, fair_order
from farspan.engine.request import SamplingParams, SequenceState
from farspan.engine.scheduler import Chunk, Costs, Limits, Preemption, Row, schedule
from farspan.engine.terms import Terms

LIMITS = Limits(max_batch_tokens=32, max_sequences=4, page_tokens=4)


def decoding(name: str, num_tokens: int = 9, **more: object) -> Row:
    return Row(name, num_tokens, num_tokens - 1, -(-(num_tokens - 1) // 4), **more)  # type: ignore[arg-type]


def test_decode_goes_first_and_prompts_get_the_rest_of_the_budget_in_chunks():
    running = [Row("long", 100, 10, 3), decoding("a"), decoding("b")]
    decision = schedule(running, [], 100, LIMITS)
    assert decision.chunks == (Chunk("a", 1, 3), Chunk("b", 1, 3), Chunk("long", 30, 10))


def test_quotas_make_an_engine_a_prefill_worker_a_decode_worker_or_a_mix():
    running = [Row("long", 100, 10, 3), decoding("a"), decoding("b")]
    waiting = [Row("new", 6, 0, 0)]

    def names(prefill, decode):
        limits = Limits(32, 4, 4, prefill_tokens=prefill, decode_tokens=decode)
        return [(chunk.request_id, chunk.num_tokens) for chunk in schedule(running, waiting, 100, limits).chunks]

    assert names(0, None) == [("a", 1), ("b", 1)]
    assert names(12, 0) == [("long", 12)]
    assert names(12, 1) == [("a", 1), ("long", 12)]


def test_a_decode_quota_serves_everybody_in_turn():
    limits = Limits(32, 8, 4, decode_tokens=2)
    waited = dict.fromkeys("abcde", 1)
    for _ in range(50):
        rows = [decoding(name, waited=waited[name]) for name in "abcde"]
        chosen = [chunk.request_id for chunk in schedule(rows, [], 100, limits).chunks]
        assert len(chosen) == 2
        waited = {name: 1 if name in chosen else count + 1 for name, count in waited.items()}
        assert max(waited.values()) <= 3


def test_pages_promised_to_a_running_prompt_are_not_given_to_whoever_comes_later():
    limits = Limits(32, 4, 4, prefill_tokens=4)
    running = [Row("long", 40, 20, 5)]
    arrived = Row("arrived", 9, 8, 2)

    def names(free):
        return [c.request_id for c in schedule(running, [arrived], free, limits, parked=[arrived]).chunks]

    # 1 page now and 4 later are the running prompt's, 1 is for its growth, 1 is what the newcomer needs.
    assert names(6) == ["long"]
    assert names(7) == ["long", "arrived"]


def test_a_prompt_holds_pages_only_for_what_is_computed():
    decision = schedule([], [Row("long", 40, 0, 0)], 100, Limits(8, 4, 4))
    assert decision.chunks == (Chunk("long", 8, 2),)


def test_what_is_found_is_neither_computed_nor_paid_for_unless_nobody_holds_it():
    found = Row("new", 20, 0, 0, hit_tokens=16, hit_pages=4, hit_idle=0)
    assert schedule([], [found], 1, LIMITS).chunks == (Chunk("new", 4, 5),)
    idle = Row("new", 20, 0, 0, hit_tokens=16, hit_pages=4, hit_idle=4)
    assert schedule([], [idle], 4, LIMITS).chunks == ()
    assert schedule([], [idle], 5, LIMITS).chunks == (Chunk("new", 4, 5),)


def test_a_request_waits_for_a_page_that_another_computes_and_keeps_nobody_from_coming_in():
    first = Row("first", 20, 0, 0, next_page=b"shared")
    second = Row("second", 20, 0, 0, next_page=b"shared")
    other = Row("other", 3, 0, 0)
    assert [c.request_id for c in schedule([], [first, second, other], 100, LIMITS).chunks] == ["first", "other"]
    running = [Row("first", 20, 4, 1, next_page=b"shared")]
    assert [c.request_id for c in schedule(running, [second], 100, LIMITS).chunks] == ["first"]


def test_the_last_in_rank_gives_its_pages_to_the_first_and_nobody_comes_in_meanwhile():
    running = [decoding("old"), decoding("young")]
    decision = schedule(running, [Row("new", 1, 0, 0)], 0, LIMITS)
    assert decision.preempted == (Preemption("young"),)
    assert [chunk.request_id for chunk in decision.chunks] == ["old"]


def test_shared_pages_do_not_count_as_freed():
    running = [decoding("old"), decoding("b", 13), decoding("c", num_own=0)]
    decision = schedule(running, [], 0, LIMITS)
    assert [p.request_id for p in decision.preempted] == ["c", "b"]


def test_a_higher_priority_takes_sequences_and_pages_from_lower_ones_only_if_that_helps():
    low = [decoding("x"), decoding("y")]
    urgent = Row("urgent", 8, 0, 0, priority=1)
    assert schedule(low, [urgent], 1, LIMITS).preempted == (Preemption("y"),)
    assert schedule([*low, decoding("z"), decoding("w")], [urgent], 50, LIMITS).preempted == (Preemption("w"),)
    assert schedule(low, [Row("huge", 80, 0, 0, priority=1)], 2, LIMITS).preempted == ()
    assert schedule(low, [Row("equal", 8, 0, 0)], 2, LIMITS).preempted == ()


def test_pages_are_kept_in_host_memory_when_that_is_cheaper_than_computing_and_there_is_room():
    running = [decoding("old"), decoding("young")]

    def offloaded(token_s, page_s, room):
        costs = Costs(token_s, page_s, room)
        (preemption,) = schedule(running, [], 0, LIMITS, costs=costs).preempted
        return preemption.offload

    assert offloaded(1.0, 1.0, 2)
    assert not offloaded(1.0, 5.0, 2), "8 tokens cost 8 s, 2 pages cost 10 s"
    assert not offloaded(1.0, 1.0, 1)
    assert not offloaded(0.0, 0.0, 100)


def test_how_many_run_side_by_side_follows_from_memory():
    limits = Limits(1000, 1000, 4)
    waiting = [Row(f"r{i}", 8, 0, 0) for i in range(100)]
    # Each takes 2 pages and keeps 1 for every sequence that is running already.
    assert len(schedule([], waiting, 60, limits).chunks) == 20
    assert len(schedule([], waiting, 600, limits).chunks) == 100


def test_tenants_are_interleaved_whatever_the_length_of_their_lines():
    claims = [Claim(f"a{i}", 0, "a", 10) for i in range(6)] + [Claim(f"b{i}", 0, "b", 20) for i in range(2)]
    assert list(fair_order(claims, {})) == ["a0", "b0", "a1", "a2", "b1", "a3", "a4", "a5"]
    assert list(fair_order(claims, {"a": 100.0}))[:2] == ["b0", "b1"]
    assert next(fair_order([*claims, Claim("u", 1, "a", 1)], {"a": 100.0})) == "u"


def test_what_is_due_first_goes_before_others_of_its_tenant_and_before_nobody_else():
    claims = [
        Claim("a0", 0, "a", 10, 90.0),
        Claim("a1", 0, "a", 10, 9.0),
        Claim("b0", 0, "b", 10, 80.0),
        Claim("b1", 0, "b", 10, 1.0),
        Claim("a2", 0, "a", 10, 5.0),
        Claim("a3", 0, "a", 10, 9.0),
    ]
    assert list(fair_order(claims, {})) == ["a2", "b1", "a1", "b0", "a3", "a0"]
    assert next(fair_order([*claims, Claim("u", 1, "a", 1, 100.0)], {})) == "u"


def test_a_request_that_waited_for_a_while_is_passed_by_nobody_who_comes_later():
    def due_s(arrived_s: float, deadline_s: float | None) -> float:
        terms = Terms(deadline_s=deadline_s)
        return SequenceState("r", [1], 1, SamplingParams(), 0, terms=terms, arrived_s=arrived_s).due_s

    # Soon enough to matter: before those that were there. Otherwise in the order of arrival.
    assert due_s(105.0, 110.0) < due_s(100.0, None) == due_s(100.0, 700.0) < due_s(101.0, 600.0)
    assert due_s(140.0, 140.1) > due_s(100.0, None)


def test_a_tenant_that_was_away_has_no_claim_to_the_time_it_missed():
    service = Service()
    service.arrive("a", set())
    service.charge("a", 1000, decode=False)
    service.arrive("b", {"a"})
    assert service.given["b"] == 1000
    service.charge("b", 10, decode=True)
    service.arrive("a", {"b"})
    assert service.given == {"a": 1020, "b": 1020}


def test_a_prompt_that_gives_pages_back_is_admitted_by_the_most_it_holds_at_a_time():
    long = Row("long", num_tokens=400, num_computed=0, num_pages=0)
    assert schedule([], [long], 12, LIMITS).chunks == ()
    windowed = replace(long, most_pages=10)
    assert [chunk.request_id for chunk in schedule([], [windowed], 12, LIMITS).chunks] == ["long"]
    assert schedule([], [windowed], 9, LIMITS).chunks == ()


def test_pages_for_a_state_that_leaves_are_kept_free_and_given_with_the_last_token():
    leaving = Row("leaving", num_tokens=8, num_computed=4, num_pages=1, num_state=3, leaves=True)
    other = Row("other", num_tokens=4, num_computed=0, num_pages=0)
    decision = schedule([leaving], [other], 5, LIMITS)
    assert [(chunk.request_id, chunk.num_pages) for chunk in decision.chunks] == [("leaving", 5)]
    decision = schedule([replace(leaving, leaves=False)], [other], 5, LIMITS)
    assert [(chunk.request_id, chunk.num_pages) for chunk in decision.chunks] == [("leaving", 2), ("other", 1)]


def test_a_place_of_a_table_has_a_page_of_every_group():
    row = Row("r", num_tokens=9, num_computed=0, num_pages=0)
    limits = replace(LIMITS, num_groups=3)
    assert schedule([], [row], 8, limits).chunks == ()
    (chunk,) = schedule([], [row], 9, limits).chunks
    assert chunk.num_pages == 9


def test_a_tenant_of_which_nothing_runs_takes_the_place_of_the_last_of_one_that_has_several():
    new = Row("new", 6, 0, 0, tenant="a")

    def preempted(running, head=new):
        return [one.request_id for one in schedule(running, [head], 100, LIMITS).preempted]

    crowd = [decoding(name, tenant="b") for name in "pqrs"]
    assert preempted(crowd) == ["s"]
    # The first of a tenant stays, and so does whoever has more priority.
    assert preempted([decoding(name, tenant=name) for name in "pqrs"]) == []
    assert preempted([replace(row, priority=1) for row in crowd]) == []
    assert preempted([*crowd[:3], decoding("x", tenant="c")]) == ["r"]
    # Of its own there is one already, or there is room.
    assert preempted([*crowd[:3], decoding("x", tenant="a")]) == []
    assert preempted(crowd[:3]) == []
