"""Random numbers depend on seed and position alone, and on every bit of the seed."""

from __future__ import annotations

import numpy as np
import pytest

from farspan.engine.sampler import uniform


@pytest.mark.parametrize("first", [0, -8, -(2**63), 2**63 - 4, 2**63, 2**64 - 8])
def test_neighbouring_seeds_give_different_numbers_over_the_whole_range(first):
    numbers = {uniform(seed, 3) for seed in range(first, first + 8)}
    assert len(numbers) == 8


def test_a_seed_is_taken_modulo_two_to_the_64():
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)
    assert uniform(-1, 5) != uniform(-2, 5)


def test_small_seeds_give_the_numbers_of_philox_as_published():
    for seed in (0, 1, 2**62):
        generator = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, 9])
        assert uniform(seed, 9) == np.random.Generator(generator).random()
