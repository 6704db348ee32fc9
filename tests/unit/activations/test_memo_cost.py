"""What a layer costs, found by calling it, against what the swap moves."""

from __future__ import annotations

import pytest
import torch
from tests.unit.activations.tiny import CAPACITY, CPU, gradients, offloading, recompute, tiny_llama, tokens

from farspan.activations.memo_cost import measure_layers
from farspan.activations.memo_tokens import memo_contexts
from farspan.memory.host import DramTier

TOKENS, WIDTH, ITEM = 24, 32, 4


def test_bytes_of_a_layer_are_those_of_its_input_attention_and_products_and_nothing_is_left_behind() -> None:
    model, seen = tiny_llama(layers=4), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    cost = measure_layers(model.model.layers, lambda: model(input_ids=tokens(0)), CPU)
    assert cost.input_bytes == TOKENS * WIDTH * ITEM
    assert cost.attention_bytes == TOKENS * (WIDTH + 4) * ITEM, "with the log-sum-exp of its four heads"
    assert cost.rest_bytes == TOKENS * (32 + 16 + 16 + 32 + 64 + 64 + 32) * ITEM
    assert 0 < cost.forward_s < cost.backward_s
    assert seen == [False, False]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_swap_never_moves_more_than_was_counted(alpha: float) -> None:
    model = tiny_llama(layers=4)
    cost = measure_layers(model.model.layers, lambda: model(input_ids=tokens(0)), CPU)
    with offloading(DramTier(CAPACITY), model, min_bytes=1, keep_last=1) as offload:
        recompute(model, memo_contexts(offload, alpha))
        gradients(model, 0, offload)
        # Positions and rotations of the sequence are saved once, outside of any layer.
        assert offload.report.stored_bytes <= 3 * cost.swapped_bytes(alpha) + 4096
        assert offload.report.stored_bytes >= 0.8 * 3 * cost.swapped_bytes(alpha)


def test_layers_that_are_recomputed_are_measured_as_any_other() -> None:
    plain, again = tiny_llama(layers=2), tiny_llama(layers=2)
    recompute(again)
    costs = [measure_layers(m.model.layers, lambda m=m: m(input_ids=tokens(0)), CPU) for m in (plain, again)]
    assert costs[0].swapped_bytes(1.0) == costs[1].swapped_bytes(1.0)
