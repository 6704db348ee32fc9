"""Seconds that a model of cost made are explained by that model, and none of them by what saves time."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from farspan.data.balance import Cost
from farspan.plan.hdp_cost import Trial, fit_cost, trials_of

# Of a model of a few layers on a processor, and of 7B weights on an accelerator, roughly.
SLOW = Cost(quadratic=4e-8, linear=2e-4, fixed=5e-3, each=4e-4, message=2e-3, travel=3e-6)
FAST = Cost(quadratic=2e-9, linear=1.4e-4, fixed=2e-3, each=1e-5, message=5e-4, travel=1e-6)
TRIALS = trials_of(capacity=8192, longest=32768, num_ranks=8)


def told(cost: Cost, one: Trial) -> float:
    """Seconds of `one`, written out."""
    if one.num_ranks == 1:
        return cost.fixed + sum(cost.quadratic * s**2 + cost.linear * s + cost.each for s in one.lengths)
    (s,), ranks = one.lengths, one.num_ranks
    sent = (ranks - 1) * (cost.message + cost.travel * s / ranks)
    return cost.fixed + (cost.quadratic * s**2 + cost.linear * s + cost.each) / ranks + sent


@pytest.mark.parametrize("cost", [SLOW, FAST], ids=["slow", "fast"])
def test_every_coefficient_is_found_again_in_the_seconds_of_a_clock_that_follows_it(cost: Cost) -> None:
    found = fit_cost(TRIALS, [told(cost, one) for one in TRIALS])
    for name in ("quadratic", "linear", "fixed", "each", "message", "travel"):
        assert getattr(found.cost, name) == pytest.approx(getattr(cost, name), rel=1e-6), name
    assert found.error < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_clock_that_is_off_by_a_fiftieth_moves_no_length_by_more_than_a_tenth(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    found = fit_cost(TRIALS, [told(SLOW, one) * generator.uniform(0.98, 1.02) for one in TRIALS])
    assert 0 < found.error < 0.1
    for tokens in (128, 512, 2048, 8192):
        assert told(found.cost, Trial((tokens,))) == pytest.approx(told(SLOW, Trial((tokens,))), rel=0.1)
    for tokens, num_ranks in ((9000, 2), (16384, 2), (20000, 4), (32768, 4), (32768, 8)):
        one = Trial((tokens,), num_ranks)
        assert told(found.cost, one) == pytest.approx(told(SLOW, one), rel=0.1)


@given(st.lists(st.floats(1e-6, 1e3), min_size=len(TRIALS), max_size=len(TRIALS)))
def test_whatever_the_clock_says_nothing_costs_less_than_nothing_and_every_token_something(
    seconds: list[float],
) -> None:
    cost = fit_cost(TRIALS, seconds).cost
    assert min(cost.quadratic, cost.fixed, cost.each, cost.message, cost.travel) >= 0
    assert cost.linear > 0


def test_no_trial_holds_more_than_a_rank_does_or_a_document_may() -> None:
    for capacity, longest, num_ranks in ((8192, 32768, 8), (100, 100, 3), (1, 1, 1), (3, 7, 4), (512, 64, 2)):
        for one in trials_of(capacity, longest, num_ranks):
            assert sum(one.lengths) <= capacity * one.num_ranks
            assert max(one.lengths) <= longest
            assert one.num_ranks <= num_ranks
            assert one.num_ranks == 1 or len(one.lengths) == 1


def test_sharing_is_timed_only_where_a_document_may_be_too_long_for_one_rank() -> None:
    assert {one.num_ranks for one in TRIALS} == {1, 2, 4, 8}
    assert {one.num_ranks for one in trials_of(8192, 8192, 8)} == {1}
    assert {one.num_ranks for one in trials_of(8192, 32768, 1)} == {1}
