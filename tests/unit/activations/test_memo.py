"""MEMO: the alpha of the linear program, the clock that confirms it, and the swap carried out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from tests.support.relative import relative_error
from tests.unit.activations.tiny import CAPACITY, equal, gradients, offloading, recompute, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from farspan.activations.memo import LayerCost, choose_alpha, simulate_stall
from farspan.activations.memo_tokens import memo_contexts
from farspan.errors import ConfigError, PlanError
from farspan.memory.host import DramTier

layers = st.builds(
    LayerCost,
    input_bytes=st.integers(1, 10**6),
    attention_bytes=st.integers(1, 10**6),
    rest_bytes=st.integers(0, 10**7),
    forward_s=st.floats(1e-4, 10),
    backward_s=st.floats(1e-4, 20),
)


@given(layers, st.integers(3, 40), st.floats(1e4, 1e9), st.integers(0, 10**9))
@settings(max_examples=200)
def test_alpha_is_the_optimum_a_linear_program_finds(layer: LayerCost, num: int, speed: float, room: int) -> None:
    fixed = layer.input_bytes + layer.attention_bytes
    solved = linprog(
        [-1.0],
        A_ub=[[layer.rest_bytes / fixed], [(num - 2) * layer.rest_bytes / fixed]],
        b_ub=[layer.forward_s * speed / fixed - 1, room / fixed - (num - 2)],
        bounds=[(0, 1)],
    )
    if (num - 2) * fixed > room:
        assert solved.status == 2
        with pytest.raises(PlanError, match="must fit on the host"):
            choose_alpha(layer, num, speed, room)
        return
    found = choose_alpha(layer, num, speed, room)
    if solved.status == 2:
        assert (found.alpha, found.stall_s > 0) == (0.0, True)
    else:
        assert found.alpha == pytest.approx(solved.x[0], abs=1e-6)
        assert found.host_bytes <= room + 1


@given(layers, st.integers(3, 40), st.floats(1e4, 1e9))
@settings(max_examples=200)
def test_nothing_waits_when_the_program_says_so(layer: LayerCost, num: int, speed: float) -> None:
    # Backward computes at least as long as forward: it does so in every model.
    layer = LayerCost(
        layer.input_bytes, layer.attention_bytes, layer.rest_bytes, layer.forward_s, layer.forward_s + layer.backward_s
    )
    found = choose_alpha(layer, num, speed, 10**18)
    if found.stall_s == 0:
        assert simulate_stall(layer, num, found.alpha, speed) <= 1e-9 * num * layer.backward_s
    else:
        # Not even X and O can hide.
        assert found.alpha == 0.0
        assert layer.swapped_bytes(0.0) / speed > layer.forward_s


def test_more_than_the_optimum_makes_the_computation_wait() -> None:
    layer = LayerCost(10, 10, 100, forward_s=1.0, backward_s=2.0)
    best = choose_alpha(layer, 12, 70.0, 10**9)
    assert best.alpha == pytest.approx(0.5)
    assert simulate_stall(layer, 12, best.alpha, 70.0) == 0.0
    assert simulate_stall(layer, 12, 1.0, 70.0) > 3.0
    assert "bandwidth" in best.reason
    assert "room" in choose_alpha(layer, 12, 70.0, 400).reason


class Cut(TorchDispatchMode):
    """Computes every matrix product in two pieces of rows, and keeps everything: no offload, no recomputation."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        num_swapped = round(self.alpha * args[0].shape[0])
        return torch.cat([func(args[0][:num_swapped], args[1]), func(args[0][num_swapped:], args[1])])


def cut_gradients(model: LlamaForCausalLM, alpha: float) -> dict[str, Tensor]:
    with ExitStack() as stack:
        for layer in model.model.layers:
            mode = Cut(alpha)
            stack.callback(layer.register_forward_pre_hook(lambda *_, m=mode: m.__enter__() and None).remove)
            stack.callback(layer.register_forward_hook(lambda *_, m=mode: m.__exit__(None, None, None)).remove)
        return gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_swapping_a_share_of_the_tokens_changes_no_bit_of_any_gradient(alpha: float, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    plain = gradients(model)
    # Matrix libraries may sum a row differently in a smaller product: the cut is the same on both sides.
    want = cut_gradients(model, alpha) if alpha == 0.3 else plain
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert all(relative_error(want[name], plain[name]) < tolerance for name in plain)
    with offloading(DramTier(CAPACITY), model, debug=True, min_bytes=1) as offload:
        recompute(model, memo_contexts(offload, alpha))
        for _ in range(3):
            assert equal(gradients(model, 0, offload), want)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_bytes_that_leave_are_the_ones_the_program_counts(alpha: float) -> None:
    num_tokens, width, item = 24, 32, 4
    model = tiny_llama(layers=4)
    with offloading(DramTier(CAPACITY), model, min_bytes=1, keep_last=2) as offload:
        recompute(model, memo_contexts(offload, alpha))
        gradients(model, 0, offload)
        # From the second step on it is known that backward does not need what `down` gave.
        gradients(model, 0, offload)
        products = 32 + 16 + 16 + 32 + 64 + 64
        layer = LayerCost(
            input_bytes=num_tokens * width * item,
            attention_bytes=num_tokens * (width + 4) * item,
            rest_bytes=num_tokens * products * item,
            forward_s=1.0,
            backward_s=2.0,
        )
        swapped_tokens = round(alpha * num_tokens)
        predicted = 2 * layer.swapped_bytes(swapped_tokens / num_tokens)
        # Positions and rotations of the sequence are saved once, outside of any layer.
        assert predicted <= offload.report.stored_bytes <= predicted + 4096


def test_an_alpha_that_is_no_share_is_refused() -> None:
    model = tiny_llama(layers=1)
    with offloading(DramTier(CAPACITY), model) as offload, pytest.raises(ConfigError, match="between 0 and 1"):
        memo_contexts(offload, 1.5)
