"""A request goes the way that costs everybody the least time, and says why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.unit.serve.loads import Plain, worker

from farspan.serve.admission import wait_before_asking_again_s
from farspan.serve.policy import Asked, Route, Rules, choose_route


def route(workers, prompt: int = 1000, answer: int = 100, rules: Rules | None = None, **more: Any) -> Route:
    asked = Asked(prompt_tokens=prompt, answer_tokens=answer, **{"seed": "s", **more})
    return choose_route(asked, workers, Plain(), rules or Rules())


def names(chosen: Route) -> tuple[str | None, str | None]:
    return chosen.prefill and chosen.prefill.worker, chosen.decode and chosen.decode.worker


def test_where_nothing_runs_one_worker_does_all_of_it():
    chosen = route([worker("p", "prefill"), worker("d")])
    assert not chosen.split
    # 1000 tokens at a millisecond; then 11 ms a token alone.
    assert (chosen.first_s, chosen.token_s) == (pytest.approx(1.0), pytest.approx(0.011))
    assert "1 s to the first token and 0.011 s a token predicted" in chosen.reason
    assert "costs everybody 2.1 s" in chosen.reason


def test_an_idle_worker_takes_all_of_it_whatever_its_role_because_streams_elsewhere_would_wait():
    chosen = route([worker("p", "prefill"), worker("d", num_running=8)])
    assert names(chosen) == (None, "p")
    # On d, eight streams would wait a second each: that is in the reason when it is the only one.
    assert "costs everybody" not in route([worker("d", num_running=8)]).reason
    held_up = choose_route(Asked(prompt_tokens=1000, answer_tokens=1), [worker("d", num_running=8)], Plain(), Rules())
    assert held_up.first_s == pytest.approx(1.0 + 2 * 0.018)


def test_a_long_prompt_goes_to_a_worker_for_prompts_and_its_answer_to_one_for_answers():
    # The quota of p gives answers almost nothing.
    workers = [worker("p", "prefill", decode_tokens=1, num_running=1), worker("d", num_running=4)]
    chosen = route(workers, prompt=2000, answer=500)
    assert names(chosen) == ("p", "d")
    assert "; costs everybody " in chosen.reason
    assert ", on one worker " in chosen.reason
    # Two iterations of 512 tokens and two more, each with the token of the one that decodes there.
    assert chosen.between_s == pytest.approx(4 * 0.011)
    assert chosen.first_s == pytest.approx(2.0 + 4 * 0.011)


def test_pages_that_are_there_are_worth_a_queue_but_not_any_queue():
    found = {"b": 900}
    assert names(route([worker("a"), worker("b")], found=found)) == (None, "b")
    near, far = worker("b", queue_tokens=800), worker("b", queue_tokens=5000)
    assert names(route([worker("a"), near], found=found)) == (None, "b")
    assert names(route([worker("a"), far], found=found)) == (None, "a")
    chosen = route([worker("a"), worker("b")], found=found)
    assert (chosen.new_tokens, "900 prompt tokens found" in chosen.reason) == (100, True)


def test_a_worker_without_room_gets_nothing_as_long_as_another_has_some():
    full = worker("b", num_running=16)
    no_pages = worker("c", free_tokens=500)
    found = {"b": 999, "c": 999}
    assert names(route([worker("a", queue_tokens=50), full, no_pages], found=found)) == (None, "a")
    assert names(route([full], found=found)) == (None, "b")


def test_ways_that_are_as_good_are_shared_out_and_a_session_keeps_to_one():
    workers = [worker(name) for name in "abcd"]
    drawn = Counter(names(route(workers, seed=str(n)))[1] for n in range(400))
    assert set(drawn) == set("abcd")
    # 100 each on average, with a deviation of 8.7.
    assert min(drawn.values()) > 55
    assert len({names(route(workers, seed=str(n), session="mine")) for n in range(50)}) == 1
    at_home = {name: names(route(workers, session=name))[1] for name in map(str, range(40))}
    fewer = [w for w in workers if w.worker != "b"]
    moved = [name for name, home in at_home.items() if names(route(fewer, session=name))[1] != home]
    # Only those whose worker is gone.
    assert moved == [name for name, home in at_home.items() if home == "b"]


def test_pages_of_another_model_or_shape_are_not_sent():
    workers = [worker("p", "prefill", decode_tokens=1, num_running=1), worker("d", num_running=4)]
    other = [worker("p", "prefill", decode_tokens=1, num_running=1, layout="m"), worker("d", num_running=4)]
    stuck = [worker("p", "prefill", decode_tokens=1, num_running=1, travels=False), worker("d", num_running=4)]
    assert route(workers, prompt=2000, answer=500).split
    assert not route(other, prompt=2000, answer=500).split
    assert not route(stuck, prompt=2000, answer=500).split


def test_when_roles_are_fixed_prompts_and_answers_keep_to_them_while_there_is_somebody():
    rules = Rules(always_split=True)
    workers = [worker("p", "prefill"), worker("q", "prefill", queue_tokens=10), worker("d"), worker("e", num_running=2)]
    assert names(route(workers, rules=rules)) == ("p", "d")
    assert names(route(workers[2:], rules=rules)) in (("e", "d"), ("d", "e"))
    assert names(route(workers[:1], rules=rules)) == (None, "p")
    short = route(workers, prompt=10, rules=Rules(11, always_split=True))
    assert names(short) == (None, "d")
    assert short.reason.startswith("10 prompt tokens, fewer than 11; ")


@pytest.mark.parametrize(("rules", "split"), [(Rules(), False), (Rules(always_split=True), True)])
def test_when_no_worker_was_heard_of_whoever_is_free_takes_it(rules, split):
    chosen = route([], rules=rules)
    assert (chosen.split, names(chosen), chosen.first_s) == (split, (None, None), None)
    assert "no worker was heard of lately" in chosen.reason


def test_the_choice_is_a_function_of_its_arguments():
    workers = [worker("p", "prefill", queue_tokens=3), worker("d", num_running=3), worker("e", num_running=3)]
    assert len({route(workers, seed="x", found={"d": 100}) for _ in range(5)}) == 1
    assert route(workers, seed="x") == route(list(reversed(workers)), seed="x")


def waits(first_s: float | None, left_s: float | None, most_s: float | None, *, predicted: bool = True) -> int | None:
    return wait_before_asking_again_s(Route(False, "", first_s=first_s, predicted=predicted), left_s, most_s)


def test_who_would_be_too_late_is_told_when_the_queue_will_be_short_enough():
    assert waits(10.0, 4.0, None) == 6
    assert waits(10.0, None, 9.5) == 1
    assert waits(10.0, 8.0, 2.5) == 8
    assert waits(1e6, 1.0, None) == 300
    assert waits(10.0, 0.0, None) == 10


def test_nobody_is_sent_away_who_is_in_time_or_because_of_a_guess():
    assert waits(10.0, 10.0, 10.0) is None
    assert waits(10.0, None, None) is None
    assert waits(None, 1.0, 1.0) is None
    assert waits(10.0, 1.0, 1.0, predicted=False) is None


def test_a_prediction_is_trusted_once_enough_prompts_of_that_class_were_seen():
    asked = Asked(prompt_tokens=10, answer_tokens=1)
    assert not choose_route(asked, [worker("a")], Plain(19), Rules()).predicted
    assert choose_route(asked, [worker("a")], Plain(20), Rules()).predicted
