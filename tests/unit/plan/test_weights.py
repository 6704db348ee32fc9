"""Bytes of weights and optimizer per process against sums done by hand."""

from __future__ import annotations

import pytest

from farspan.config.schema import WeightsConfig
from farspan.plan.weights import weights_bytes


@pytest.mark.parametrize(
    ("weights", "state", "gradient", "host"),
    [
        (WeightsConfig(), 12 * 25, 4 * 25, 0),
        (WeightsConfig(offload_optimizer="cpu"), (4 + 12 + 4) * 25, 0, (12 + 4) * 25),
        (WeightsConfig(engine="deepspeed", zero=1), 12 * 25 + 2 * 100, 4 * 100, 0),
        (WeightsConfig(engine="deepspeed", zero=2), 12 * 25 + 2 * 100, 4 * 25, 0),
        (WeightsConfig(engine="deepspeed", zero=3), 12 * 25 + 2 * 25, 4 * 25, 0),
        (WeightsConfig(engine="deepspeed", zero=3, offload_optimizer="cpu"), 12 * 25 + 2 * 25, 4 * 25, 12 * 25),
    ],
    ids=["fsdp2", "fsdp2, offload", "zero 1", "zero 2", "zero 3", "zero 3, offload"],
)
def test_a_hundred_weights_on_four_ranks_in_bf16(weights: WeightsConfig, state: int, gradient: int, host: int) -> None:
    kept = weights_bytes(weights, num_frozen=0, num_trained=100, num_ranks=4, compute_bytes=2)
    assert (kept.state, kept.gradient, kept.host) == (state, gradient, host)


def test_frozen_weights_have_no_states_and_no_gradients() -> None:
    kept = weights_bytes(WeightsConfig(), num_frozen=1000, num_trained=8, num_ranks=2, compute_bytes=2)
    assert (kept.state, kept.gradient) == (1000 * 2 // 2 + 8 * 12 // 2, 8 * 4 // 2)


def test_8_bit_moments_are_two_codes_and_two_scales_of_256_numbers() -> None:
    kept = weights_bytes(WeightsConfig(), 0, num_trained=1024, num_ranks=2, compute_bytes=2, optimizer="adamw8bit")
    assert kept.state == (4 * 1024 + 2 * 1024 + 2 * 4 * 4) // 2


def test_a_float64_run_keeps_twice_as_much() -> None:
    kept = weights_bytes(WeightsConfig(), num_frozen=0, num_trained=10, num_ranks=1, compute_bytes=8)
    assert (kept.state, kept.gradient) == (240, 80)
