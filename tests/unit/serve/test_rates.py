"""Running numbers are those of what came lately."""

from __future__ import annotations

import random

import pytest

from farspan.serve.rates import Mean, Percentile, Rate


def test_an_even_stream_has_its_rate_from_the_beginning_on():
    rate = Rate(20.0, 100.0)
    assert rate.per_s(100.0) == 0.0
    for step in range(1, 3001):
        rate.add(5.0, 100.0 + step * 0.1)
        if step in (10, 100, 3000):
            # Each amount comes at the end of its interval: at most one of them too many.
            assert rate.per_s(100.0 + step * 0.1) == pytest.approx(50.0, rel=1.2 / step + 0.01)


def test_a_stream_that_ends_is_forgotten():
    rate = Rate(20.0, 0.0)
    for step in range(1000):
        rate.add(5.0, step * 0.1)
    assert rate.per_s(120.0) == pytest.approx(50 * 2.718281828**-1, rel=0.05)
    assert rate.per_s(1000.0) < 1e-10


def test_a_mean_begins_with_the_first_value_and_follows():
    mean = Mean(128.0, 0.1)
    assert mean.value == 128.0
    mean.add(10.0)
    assert mean.value == 10.0
    for _ in range(100):
        mean.add(20.0)
    assert mean.value == pytest.approx(20.0, abs=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_percentile_is_exceeded_as_often_as_it_says(scale):
    rng, percentile = random.Random(1), Percentile(95)
    values = [scale * rng.expovariate(1.0) for _ in range(20_000)]
    above = 0
    for number, value in enumerate(values):
        above += number >= 10_000 and value > percentile.value
        percentile.add(value)
    assert above / 10_000 == pytest.approx(0.05, abs=0.01)
