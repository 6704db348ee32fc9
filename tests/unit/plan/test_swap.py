"""MEMO's share before a run: the planner's layer is the measured one, and its program is the run's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.plan.test_trace import LLAMA_8B, MODELS, live_hidden, live_model

from farspan.activations.memo import choose_alpha, in_hundredths
from farspan.activations.memo_cost import measure_layers
from farspan.models.checkpoint import make_config
from farspan.models.parts import decoder_layers
from farspan.plan.choice import Choice
from farspan.plan.cost import Task, plan_of_choice
from farspan.plan.exchange import ways_of
from farspan.plan.machine import GB, parse_machine
from farspan.plan.profile import ModelProfile
from farspan.plan.search import Space, search
from farspan.plan.swap import predict_share, swap_cost, with_share
from farspan.plan.trace import trace_model

CPU = torch.device("cpu")
SWAPPED = Choice(recompute=True, offload_activations="cpu", sp=8, tiled_mlp=True, lora_rank=16)


def task_of(profile: ModelProfile, tokens: int, link: float = 63.0, host_gib: float = 2000.0) -> Task:
    machine = parse_machine("h100:8", host_gib=host_gib)
    machine = replace(machine, device=replace(machine.device, host_link=link * GB))
    return Task(profile, machine, tokens, ways_of(profile, [1, 8]))


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return trace_model(make_config("llama", LLAMA_8B))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi"])
def test_the_bytes_of_a_layer_are_those_that_a_run_counts(architecture: str) -> None:
    config = make_config(architecture, MODELS[architecture])
    model, tokens = live_model(config), 640
    measured = measure_layers(decoder_layers(model), lambda: live_hidden(model, tokens), CPU)
    traced = trace_model(config)
    task = Task(traced, parse_machine("h100:1"), tokens, ways_of(traced, [1]))
    planned = swap_cost(task, Choice(recompute=True, offload_activations="cpu"))
    assert planned.input_bytes == measured.input_bytes
    assert planned.attention_bytes == measured.attention_bytes
    assert planned.rest_bytes == measured.rest_bytes


def test_the_share_is_the_program_over_the_machines_own_speeds(profile: ModelProfile) -> None:
    for tokens, link in ((65536, 63.0), (131072, 20.0), (262144, 8.0)):
        task = task_of(profile, tokens, link)
        share, why = predict_share(task, SWAPPED)
        layer, speed = swap_cost(task, SWAPPED), link * GB * task.machine.efficiency.host_link
        want = choose_alpha(layer, 32, min(speed, task.machine.host_bandwidth / 8), 10**15, 1)
        assert share == in_hundredths(want.alpha)
        assert f"predicted to be {share:g}" in why
        assert want.reason in why
    shares = [predict_share(task_of(profile, 131072, link), SWAPPED)[0] for link in (4.0, 12.0, 20.0, 63.0)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1], "a faster link hides more"


def test_without_room_for_what_always_moves_nothing_is_swapped_and_the_reason_is_told(profile: ModelProfile) -> None:
    share, why = predict_share(task_of(profile, 1 << 20, host_gib=8.0), SWAPPED)
    assert share == 0
    assert "must fit on the host" in why


def test_a_swap_is_counted_in_bytes_and_in_time(profile: ModelProfile) -> None:
    task = task_of(profile, 262144)
    plain, swapped = (plan_of_choice(task, with_share(task, SWAPPED, share)) for share in (0.0, 0.4))
    shard, (kind,) = 262144 // 8, profile.kinds
    more = 32 * (kind.attention_out(shard) + 0.4 * kind.products(shard))
    assert swapped.footprint.activations_host - plain.footprint.activations_host == pytest.approx(more)
    spared = plain.duration.compute_s - swapped.duration.compute_s
    speed = task.machine.device.flops
    assert kind.attention is not None
    attention = kind.attention.flops(262144) / 8 / (speed * task.machine.efficiency.attention)
    products = 0.4 * kind.whole.forward.flops(shard) / (speed * task.machine.efficiency.gemm)
    assert spared == pytest.approx(32 * (attention + products))
    assert "swap 40%" in swapped.choice.memory_text()


def test_only_layers_that_are_computed_again_and_offloaded_are_swapped(profile: ModelProfile) -> None:
    task = task_of(profile, 131072)
    found = search(task, Space(swap_share="auto", lora_rank=16, weights=(("fsdp2", 3),)))
    shares = {
        (plan.choice.recompute, plan.choice.offload_activations, plan.choice.chunk): plan.choice.swap_share > 0
        for plan in found.plans
    }
    assert any(shares.values())
    assert all(not swapped or key == (True, "cpu", "none") for key, swapped in shares.items())
    assert all(plan.choice.swap_share == 0 for plan in search(task, Space(lora_rank=16)).plans)
