"""Predicted times follow what was seen, whatever was assumed, and never fall when there is more to do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import nnls

from farspan.serve.predict import Fit, Predictor

Seconds = Callable[[float, float], float]


def slow(new: float, context: float) -> float:
    return 0.02 + 3e-4 * new + 2e-8 * new * context


def fast(new: float, context: float) -> float:
    return 0.004 + 2e-6 * new + 3e-10 * new * context


def seen(rng: random.Random) -> tuple[float, float]:
    new = math.exp(rng.uniform(math.log(10), math.log(20_000)))
    return new, new / 2 + rng.choice((0, 0, 4_000, 50_000))


def taught(truth: Seconds, noise: float, count: int, times: Predictor, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        new, context = seen(rng)
        times.learn_prefill("k", new, context, truth(new, context) * math.exp(rng.gauss(0, noise)))


def worst(truth: Seconds, times: Predictor) -> float:
    """Largest relative error over the range that was seen."""
    points = [(new, new / 2 + more) for new in (10, 100, 1_000, 20_000) for more in (0, 4_000, 50_000)]
    return max(abs(times.prefill_s("k", *point) / truth(*point) - 1) for point in points)


@pytest.mark.parametrize("truth", [slow, fast])
def test_without_noise_the_truth_is_found_however_wrong_the_first_guess_was(truth):
    times = Predictor()
    assert worst(truth, times) > 0.5
    taught(truth, 0.0, 40, times, seed=1)
    assert worst(truth, times) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_with_noise_of_a_fifth_the_error_is_a_small_part_of_it(seed):
    times = Predictor()
    taught(slow, 0.2, 400, times, seed)
    # About 50 observations count: 0.2 / sqrt(50) is 3 %, and a few times that at the edges of three terms.
    assert worst(slow, times) < 0.15


def test_a_machine_that_gets_slower_is_noticed_within_two_hundred_requests():
    times = Predictor()
    taught(fast, 0.1, 1000, times, seed=2)
    taught(slow, 0.1, 200, times, seed=3)
    assert worst(slow, times) < 0.15


@pytest.mark.parametrize("seed", range(20))
def test_whatever_was_seen_a_prediction_is_never_negative_and_grows_with_the_work(seed):
    rng, times = random.Random(seed), Predictor()
    for _ in range(60):
        # Nonsense: longer prompts took less time.
        new = rng.uniform(1, 10_000)
        times.learn_prefill("k", new, rng.uniform(0, 50_000), rng.choice((1.0, 1e-9, 5.0, 100.0)) / new)
        times.learn_decode("k", rng.uniform(0, 64), rng.uniform(0, 1e6), rng.random())
        times.learn_transfer(rng.uniform(0, 1e9), rng.random() / new)
    for less, more in ((1, 2), (10, 1_000), (1_000, 100_000)):
        assert 0 <= times.prefill_s("k", less, 10) <= times.prefill_s("k", more, 10)
        assert times.prefill_s("k", 50, less) <= times.prefill_s("k", 50, more)
        assert 0 <= times.decode_s("k", less, 10) <= times.decode_s("k", more, 10)
        assert times.decode_s("k", 5, less) <= times.decode_s("k", 5, more)
        assert 0 <= times.transfer_s(less) <= times.transfer_s(more)


@pytest.mark.parametrize("seed", range(20))
def test_the_coefficients_are_those_of_nonnegative_least_squares(seed):
    """Equals scipy's solver on the same weighted rows."""
    rng = np.random.default_rng(seed)
    keep, assumed = 0.9, (1.0, 1.0, 1.0)
    rows, seconds = rng.uniform(0, 1, (30, 3)), rng.uniform(0.1, 1, 30)
    fit = Fit(assumed, keep, off=math.inf)
    for row, second in zip(rows, seconds, strict=True):
        fit.learn(tuple(row), float(second))
    weights = keep ** (np.arange(29, -1, -1) / 2) / seconds
    best, _ = nnls(rows * weights[:, None], seconds * weights)
    for row in rng.uniform(0, 1, (10, 3)):
        # What was assumed counts next to nothing.
        assert fit.seconds(tuple(row)) == pytest.approx(float(row @ best), abs=1e-6)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_what_is_no_time_teaches_nothing(seconds):
    times = Predictor()
    taught(slow, 0.0, 40, times, seed=4)
    before = times.prefill_s("k", 100, 100)
    times.learn_prefill("k", 100, 100, seconds)
    times.learn_prefill("k", -1, 100, 1.0)
    assert times.prefill_s("k", 100, 100) == before
    assert times.num_prefills("k") == 40


def test_classes_of_workers_are_learned_apart():
    times = Predictor()
    taught(slow, 0.0, 40, times, seed=5)
    assert times.prefill_s("other", 1_000, 0) == Predictor().prefill_s("k", 1_000, 0)
    assert (times.num_prefills("k"), times.num_prefills("other")) == (40, 0)


def test_directions_that_nobody_saw_keep_what_was_assumed():
    times = Predictor()
    for _ in range(50):
        # Always alone with little to look at: nothing says what a neighbour costs.
        times.learn_decode("k", 1, 0, 0.02)
    assert times.decode_s("k", 1, 0) == pytest.approx(0.02, rel=1e-3)
    assert times.decode_s("k", 20, 0) > times.decode_s("k", 1, 0)
