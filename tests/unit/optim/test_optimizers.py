"""Optimizers that take less memory: the published bytes, and the losses or bits of the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import pytest
import torch
from tests.unit.activations.tiny import equal, gradients, tiny_llama, tokens
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.memory.host import DramTier
from farspan.optim.adamw8bit import AdamW8bit
from farspan.optim.host import HostOptimizer
from farspan.optim.make import clip_grad_norm, make_optimizer, state_bytes


@dataclass
class Settings:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95


def groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    passes: int = 1,
    first: int = 0,
    data: Callable[[int], Tensor] = tokens,
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        total = 0.0
        for part in range(passes):
            ids = data(7 * step + part)
            loss = model(input_ids=ids, labels=ids).loss / passes
            loss.backward()
            total += loss.item()
        clip_grad_norm(optimizer, model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - 0.5 * step / (first + steps))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def wide_llama() -> nn.Module:
    return tiny_llama(layers=1, width=256)


@pytest.fixture
def optimizers() -> Iterator[Any]:
    made: list[HostOptimizer] = []

    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(groups(model), Settings(), **options)
        if isinstance(optimizer, HostOptimizer):
            made.append(optimizer)
        return optimizer

    yield make
    for optimizer in made:
        optimizer.close()
        optimizer._tier.close()


def chain(step: int) -> Tensor:
    """48 tokens of a language that can be learned: seven of ten follow from the one before."""
    follower_V = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 64, (1, 48), generator=generator)
    follows_T = torch.rand(48, generator=generator) < 0.7
    for place in range(1, 48):
        if follows_T[place]:
            ids[0, place] = follower_V[ids[0, place - 1]]
    return ids


def test_8_bit_losses_are_within_one_percent_of_fp32_over_200_steps(optimizers: Any) -> None:
    models = wide_llama(), wide_llama()
    plain, small = optimizers(models[0]), optimizers(models[1], kind="adamw8bit")
    losses = [train(m, o, 200, data=chain) for m, o in zip(models, (plain, small), strict=True)]
    means = [[sum(found[i : i + 20]) / 20 for i in range(0, 200, 20)] for found in losses]
    assert means[0][-1] < 0.75 * means[0][0]
    assert all(abs(a - b) < 0.01 * a for a, b in zip(*means, strict=True))
    # Two bytes and two 256ths of a float per weight in place of eight bytes; norms keep theirs.
    assert state_bytes(small) / state_bytes(plain) == pytest.approx(0.2539, abs=0.002)


def test_a_matrix_is_stepped_as_bitsandbytes_steps_it() -> None:
    ours, theirs = (nn.Parameter(torch.randn(32, 512, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    pair = (ours, AdamW8bit([ours], **options)), (theirs, bitsandbytes.optim.AdamW8bit([theirs], **options))
    for step in range(5):
        grad = torch.randn(32, 512, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in pair:
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(pair[0][1].state[ours]["exp_avg_codes"], pair[1][1].state[theirs]["state1"])


def test_what_is_not_in_blocks_is_stepped_as_torch_steps_it() -> None:
    ours, theirs = (nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    pair = (ours, AdamW8bit([ours], **options)), (theirs, torch.optim.AdamW([theirs], foreach=False, **options))
    for step in range(5):
        for weight, optimizer in pair:
            weight.grad = torch.randn(100, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_an_offloaded_optimizer_makes_the_same_bits(kind: str, passes: int, optimizers: Any) -> None:
    make = wide_llama if kind == "adamw8bit" else tiny_llama
    models = make(), make()
    plain = optimizers(models[0], kind=kind)
    away = optimizers(models[1], kind=kind, offload="cpu")
    assert train(models[0], plain, 6, passes) == train(models[1], away, 6, passes)
    assert equal(weights(models[0]), weights(models[1]))
    assert state_bytes(plain) == state_bytes(away)


def test_gradients_leave_the_device_during_backward() -> None:
    model = tiny_llama()
    tier = DramTier(64 << 20)
    optimizer = make_optimizer(groups(model), Settings(), offload="cpu", tier=tier)
    assert isinstance(optimizer, HostOptimizer)
    present: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: present.append(sum(q.grad is not None for q in model.parameters()))
        )
    gradients(model)
    assert present
    assert max(present) == 0
    assert tier.stats().stored_bytes == 2 * sum(p.numel() * 4 for p in model.parameters())
    assert set(tier.stats().owners) == {"optimizer"}
    optimizer.close()
    tier.close()


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_states_survive_a_round_trip(kind: str, offload: str, optimizers: Any) -> None:
    model, again = wide_llama(), wide_llama()
    first = optimizers(model, kind=kind, offload=offload)
    train(model, first, 3)
    saved, start = deepcopy(first.state_dict()), weights(model)
    want = train(model, first, 3, first=3)
    second = optimizers(again, kind=kind, offload=offload)
    with torch.no_grad():
        # A checkpoint writes into the device's weights behind the optimizer's back.
        for name, p in again.named_parameters():
            p.copy_(start[name])
    second.load_state_dict(saved)
    assert train(again, second, 3, first=3) == want
    assert equal(weights(model), weights(again))


def test_states_go_between_the_device_and_the_host(optimizers: Any) -> None:
    models = tiny_llama(), tiny_llama()
    here, away = optimizers(models[0]), optimizers(models[1], offload="cpu")
    train(models[0], here, 3)
    with torch.no_grad():
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            b.copy_(a)
    away.load_state_dict(here.state_dict())
    assert train(models[0], here, 2, first=3) == train(models[1], away, 2, first=3)


def test_weights_of_64_bits_and_unknown_words_are_refused() -> None:
    model = tiny_llama(dtype=torch.float64)
    with pytest.raises(ConfigError, match="at most 32 bits"):
        make_optimizer(groups(model), Settings(), kind="adamw8bit")
    with pytest.raises(ConfigError, match=r"optim\.kind"):
        make_optimizer(groups(model), Settings(), kind="adam8")
    with pytest.raises(ConfigError, match=r"weights\.offload_optimizer"):
        make_optimizer(groups(model), Settings(), offload="gpu")
