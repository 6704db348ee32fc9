"""The number of workers follows what arrives, and does not flutter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest

from farspan.serve.autoscale import Objectives, Role, Signals, sizes
from farspan.serve.sizing import Sizing, as_metrics, signals

AIMS = Objectives(first_token_s=2.0, token_s=0.1)


def told(**more: float) -> Signals:
    return Signals(**{"prefill_rate": 1000.0, "decode_rate": 100.0, "num_open": 10.0, **more})


def wanted(seen: Signals, prefill: int = 1, decode: int = 1, least: int = 1, most: int = 8) -> tuple[int, int]:
    return sizes(seen, Role(prefill, prefill, least, most), Role(decode, decode, least, most), AIMS)


@pytest.mark.parametrize(("per_s", "hit", "expected"), [(700, 0, 1), (900, 0, 2), (3000, 0, 4), (3000, 0.8, 1)])
def test_prompts_that_are_not_found_decide_about_prefill_workers(per_s, hit, expected):
    assert wanted(told(prompt_tokens_s=per_s, hit_rate=hit)) == (expected, 1)


@pytest.mark.parametrize(("per_s", "kv", "expected"), [(70, 0, 1), (90, 0, 2), (300, 0, 4), (10, 0.9, 2), (10, 0.7, 1)])
def test_tokens_and_the_room_they_need_decide_about_decode_workers(per_s, kv, expected):
    assert wanted(told(answer_tokens_s=per_s, kv_share=kv)) == (1, expected)


def test_what_clients_see_goes_before_what_the_rates_say():
    assert wanted(told(answer_tokens_s=10, token_s=0.2)) == (1, 2)
    assert wanted(told(prompt_tokens_s=10, queue_age_s=1.5)) == (2, 1)
    assert wanted(told(prompt_tokens_s=10, first_s=3.0), decode=3) == (2, 1)
    # Only one more at a time: the one that is still starting is that one.
    starting = sizes(told(answer_tokens_s=10, token_s=0.2), Role(1, 1, 1, 8), Role(3, 2, 1, 8), AIMS)
    assert starting == (1, 3)


def test_a_load_between_the_two_marks_changes_nothing_in_either_direction():
    for per_s in range(121, 160, 2):
        assert wanted(told(answer_tokens_s=per_s), decode=2)[1] == 2
        assert wanted(told(answer_tokens_s=per_s), decode=3)[1] == 3
    assert wanted(told(answer_tokens_s=165), decode=2)[1] == 3
    assert wanted(told(answer_tokens_s=115), decode=3)[1] == 2


def test_bounds_hold_whatever_is_seen():
    assert wanted(told(prompt_tokens_s=1e9, answer_tokens_s=1e9, kv_share=1.0, token_s=9.0)) == (8, 8)
    assert wanted(Signals(), prefill=5, decode=5, least=2) == (2, 2)


def test_when_nobody_asks_all_may_stop_and_the_first_request_wakes_one_that_answers():
    assert wanted(Signals(), least=0) == (0, 0)
    assert wanted(told(num_open=1), 0, 0, least=0) == (0, 1)
    # An answer that is still given keeps its worker.
    assert wanted(told(num_open=1), 1, 1, least=0) == (0, 1)


def test_few_prompts_need_no_worker_of_their_own_where_a_role_may_be_empty():
    few = told(prompt_tokens_s=200, answer_tokens_s=70)
    assert wanted(few, 0, 1, least=0) == (0, 2)
    assert wanted(few, 1, 1, least=1) == (1, 1)
    assert wanted(told(prompt_tokens_s=400, answer_tokens_s=70), 0, 1, least=0) == (1, 1)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 3), (0, 0)])
def test_while_nothing_is_heard_from_workers_those_that_are_there_stay(prefill, decode):
    unheard = Signals(prompt_tokens_s=500, answer_tokens_s=50, num_open=3, token_s=9.0)
    assert wanted(unheard, prefill, decode, least=0) == (prefill, max(1, decode))


@dataclass
class Context:
    """As Ray Serve's AutoscalingContext, as far as it is read."""

    deployment_name: str
    current_num_replicas: int = 1
    target_num_replicas: int = 1
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 4
    raw_metrics: dict[str, Any] = field(default_factory=dict)


def series(*told_by: Signals) -> dict[str, Any]:
    def of(name: str) -> Iterator[tuple[str, list[Any]]]:
        for number, one in enumerate(told_by):
            newest = SimpleNamespace(value=as_metrics(one)[name])
            yield f"replica{number}", [SimpleNamespace(value=-1.0), newest]

    return {each.name: dict(of(each.name)) for each in fields(Signals)}


def test_the_policy_reads_the_newest_signals_of_the_ingress_and_answers_for_every_deployment():
    seen = told(prompt_tokens_s=1700.0, answer_tokens_s=290.0)
    api = Context("api", raw_metrics=series(seen))
    contexts = {1: api, 2: Context("prefill"), 3: Context("decode")}
    assert signals(api) == seen
    assert Sizing({"": (2.0, 0.1)})(contexts) == ({1: 1, 2: 3, 3: 4}, {})


def test_signals_of_several_ingresses_are_one_load():
    both = signals(Context("api", raw_metrics=series(told(prompt_tokens_s=5, token_s=0.2), told(prompt_tokens_s=7))))
    assert (both.prompt_tokens_s, both.token_s, both.num_open, both.prefill_rate) == (12, 0.2, 20, 1000)


def test_while_the_application_is_not_all_there_nothing_changes():
    contexts = {2: Context("prefill", target_num_replicas=3), 3: Context("decode")}
    assert Sizing({"": (2.0, 0.1)})(contexts) == ({2: 3, 3: 1}, {})
    contexts = {1: Context("api"), 2: Context("prefill", target_num_replicas=3), 3: Context("decode")}
    # The ingress has said nothing yet.
    assert Sizing({"": (2.0, 0.1)})(contexts)[0][1] == 1


def test_the_policy_is_what_ray_serve_takes_and_ray_applies_its_delays_to_it():
    """Through Ray Serve's own wrapper, pickled as its controller gets it."""
    from ray import cloudpickle
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    policy = AutoscalingPolicy(
        policy_function="farspan.serve.sizing:Sizing", policy_kwargs={"objectives": {"": [2.0, 0.1]}}
    )
    policy = cloudpickle.loads(cloudpickle.dumps(policy))
    asked = _apply_app_level_autoscaling_config(_resolve_policy_callable(policy))
    config = AutoscalingConfig(min_replicas=1, max_replicas=4, upscale_delay_s=0.0, downscale_delay_s=1e6)
    contexts = {}
    for name, now in (("api", 1), ("prefill", 2), ("decode", 1)):
        context = Context(name, now, now)
        context.config, context.policy_state, context.total_num_requests = config, {}, 1.0  # type: ignore[attr-defined]
        contexts[name] = context
    contexts["api"].raw_metrics = series(told(prompt_tokens_s=100, answer_tokens_s=150.0))
    # Decode grows at once; prefill would shrink, which must first have been right for a long time.
    assert asked(contexts)[0] == {"api": 1, "prefill": 2, "decode": 2}
