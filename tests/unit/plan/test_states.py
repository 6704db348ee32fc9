"""Bytes of weights and optimizer states equal those that optimizers really keep, and are cut as engines cut them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tests.unit.plan.test_search import random_profile

from farspan.config.schema import OptimConfig
from farspan.memory.host import DramTier
from farspan.optim.host import HostOptimizer
from farspan.optim.make import make_optimizer
from farspan.plan.choice import Choice
from farspan.plan.profile import ModelProfile
from farspan.plan.states import states_of

NUMBERS = 4096 * 64


def profile_of(num_parameters: int) -> ModelProfile:
    return replace(random_profile(random.Random(0)), num_parameters=num_parameters)


def kept_by(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> int:
    """Bytes of states that grow with the weight."""
    state = [x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in state if x.numel() > 256)


def weight_with_gradient() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.ones_like(weight)
    return weight


def test_moments_are_as_many_bytes_as_adamw_keeps() -> None:
    weight = weight_with_gradient()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    assert states_of(profile_of(NUMBERS), Choice()).optimizer == kept_by(optimizer, weight)


def test_8_bit_moments_are_as_many_bytes_as_bitsandbytes_keeps() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = weight_with_gradient()
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    optimizer.step()
    assert states_of(profile_of(NUMBERS), Choice(optimizer="adamw8bit")).optimizer == kept_by(optimizer, weight)


@pytest.mark.parametrize(
    ("engine", "zero", "whole", "over_ranks"),
    [("fsdp2", 3, 0, 16), ("deepspeed", 1, 4, 12), ("deepspeed", 2, 2, 14), ("deepspeed", 3, 0, 16)],
)
def test_states_are_cut_over_the_ranks_as_the_engine_cuts_them(
    engine: str, zero: int, whole: int, over_ranks: int
) -> None:
    profile = profile_of(NUMBERS)
    for dp, sp in ((1, 1), (2, 4), (8, 1)):
        states = states_of(profile, Choice(dp=dp, sp=sp, engine=engine, zero=zero))
        expected = NUMBERS * (whole + over_ranks / (dp * sp))
        assert states.fixed - states.buckets == pytest.approx(expected)
        assert states.host == 0


def test_offloaded_states_leave_the_device_and_arrive_in_host_memory() -> None:
    profile = profile_of(NUMBERS)
    for engine, zero, stays in (("fsdp2", 3, 4 / 4), ("deepspeed", 2, 2), ("deepspeed", 3, 2 / 4)):
        choice = Choice(dp=4, engine=engine, zero=zero, offload_optimizer="cpu")
        states = states_of(profile, choice)
        assert states.fixed - states.buckets == pytest.approx(NUMBERS * stays)
        assert states.host == pytest.approx(NUMBERS * 16 / 4)


@pytest.mark.parametrize(("chunk", "passes"), [("none", 1), ("seco", 2)])
def test_an_offloaded_optimizer_holds_as_much_on_the_host_and_leaves_as_much_on_the_device(
    chunk: str, passes: int
) -> None:
    """By chunks gradients of a weight arrive more than once."""
    weight = weight_with_gradient()
    tier = DramTier(1 << 30)
    optimizer = make_optimizer([{"params": [weight]}], OptimConfig(), offload="cpu", tier=tier)
    assert isinstance(optimizer, HostOptimizer)
    for _ in range(passes):
        weight.grad = None
        (weight * 2).sum().backward()
    optimizer.step()
    states = states_of(profile_of(NUMBERS), Choice(chunk=chunk, offload_optimizer="cpu"))
    assert states.host == tier.stats().used_bytes
    assert states.fixed == weight.nbytes
    optimizer.close()
    tier.close()
